"""Which way an engine sleeps, and what its line in `trlpatch.status()` says."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.fakes.engine import RecordingEngineStub
from tests.fakes.sleep_rig import ALL, KV, Rig
from trlpatch.engine.describe import describe, describe_engines
from trlpatch.engine.memory import cumem, device, headroom, sleep_mode
from trlpatch.engine.memory.device import GIB
from trlpatch.engine.memory.headroom import HeadroomMonitor
from trlpatch.engine.memory.sleep_mode import unsupported_reason
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.sleep import put_to_sleep, sleep_default, wake
from trlpatch.engine.state import forget, state_of
from trlpatch.errors import EngineAsleep, EngineBusy, InvalidOption


@pytest.fixture(autouse=True)
def sampled_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "sample", lambda model: (getattr(model, "weight", None),))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch, "0.26", shared=False)
    rig.device.total = 100 * GIB
    yield rig
    forget(rig.engine)


class PolicyStub:
    """A model whose weights are one number; tests/engine/test_training_room.py has real ones."""

    def __init__(self) -> None:
        self.weight = 0.0

    def step(self) -> None:
        self.weight += 1.0


class Training:
    """A trainer whose step takes `gib` of the device at its peak, in torch's allocator."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig, self.policy, self.peak = rig, PolicyStub(), 5 * GIB
        monkeypatch.setattr(device, "reserved_bytes", lambda where=None: (5 * GIB, self.peak))

    def cycle(self, gib: float, *, step: bool = True) -> int:
        """Sleep, train, wake; returns the units that the sleep unmapped."""
        put_to_sleep(self.rig.engine, self.rig.state, 1, model=self.policy)
        unmapped = ALL - self.rig.mapped()
        if step:
            self.policy.step()
        self.peak = max(self.peak, int((5 + gib) * GIB))
        for tag in (WEIGHTS, KV_CACHE):
            wake(self.rig.engine, self.rig.state, tag)
        self.rig.roll_out()
        return unmapped


@pytest.fixture
def training(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Training:
    return Training(rig, monkeypatch)


def test_separate_weights_stay_once_a_step_was_measured_to_leave_room(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        assert [training.cycle(20) for _ in range(4)] == [ALL, KV, KV, KV]
    # 100 GiB, all 12 of the engine unmapped; 20 taken, and 4 for the weights that would stay.
    assert caplog.text.count("a training step took 20.0 GiB and leaves 76.0 GiB free beside the engine's weights") == 1
    assert training.rig.state.sleep_method == "KV cache only (training leaves room for the weights)"


def test_a_phase_without_an_optimizer_step_decides_nothing(training: Training) -> None:
    assert [training.cycle(20, step=False) for _ in range(3)] == [ALL] * 3
    assert [training.cycle(20), training.cycle(20)] == [ALL, KV]


@pytest.mark.parametrize(("takes", "enough"), [(47.9, True), (48.1, False), (95, False)])
def test_the_margin_is_what_the_step_took(training: Training, takes: float, enough: bool) -> None:
    # 100 - 4 - takes >= takes
    assert [training.cycle(takes), training.cycle(takes)] == [ALL, KV if enough else ALL]


@pytest.mark.parametrize(("free", "enough"), [(7.1, True), (6.9, False)])
def test_the_margin_is_two_gibibytes_at_the_least(free: float, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5 * GIB, 6 * GIB])
    monkeypatch.setattr(device, "free_bytes", lambda where=None: int(free * GIB))
    monkeypatch.setattr(device, "reserved_bytes", lambda where=None: (5 * GIB, next(peaks)))
    room, policy = HeadroomMonitor(), PolicyStub()
    room.begin(weights=4 * GIB, weights_unmapped=True, model=policy)
    policy.step()
    assert bool(room.end()) == room.suffices == enough  # free - 1 - 4 >= 2


def test_weights_make_way_again_when_training_grows_into_their_room(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        assert [training.cycle(20), training.cycle(20)] == [ALL, KV]
        # The cache alone sleeps: 96 GiB are free beside the weights.
        assert training.cycle(95.5) == KV
        training.peak = 5 * GIB
        assert [training.cycle(1), training.cycle(1)] == [ALL, ALL], "and that is final"
    assert caplog.text.count("training left 0.5 GiB free beside the engine's weights: they make way again") == 1


def test_a_peak_that_was_reset_tells_nothing(training: Training) -> None:
    rig = training.rig
    put_to_sleep(rig.engine, rig.state, 1, model=training.policy)
    training.policy.step()
    training.peak -= 1
    wake(rig.engine, rig.state, WEIGHTS)
    wake(rig.engine, rig.state, KV_CACHE)
    assert not rig.state.headroom.suffices
    assert rig.state.headroom.left is None


def test_kv_sleep_as_asked(rig: Rig) -> None:
    assert rig.sleep(level=2, kv_only=True)
    assert rig.mapped() == ALL - KV
    assert not rig.state.weights_lost
    assert rig.state.sleep_method == 'KV cache only (sleep="kv")'


def test_kv_sleep_that_cannot_be_falls_back_to_level_1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(monkeypatch, "0.26", shared=False, elsewhere=True)
    assert rig.sleep(kv_only=True)
    assert rig.mapped() == 0
    assert "the KV cache cannot sleep alone: its workers live in other processes" in caplog.text
    assert rig.state.sleep_method == "level 1 (weights to the CPU and back)"


@pytest.mark.parametrize("level", [1, 2])
def test_the_level_asked_for_is_used_otherwise(rig: Rig, level: int) -> None:
    assert rig.sleep(level=level)
    assert rig.mapped() == 0
    assert rig.state.weights_lost == (level == 2)


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_with_unfinished_requests_stays_awake_at_every_level(level: int) -> None:
    engine = RecordingEngineStub(sleep=True)
    engine.llm_engine.has_unfinished_requests = lambda: True
    with pytest.raises(EngineBusy, match="unfinished requests"):
        put_to_sleep(engine, state_of(engine), level)
    assert not any(call.startswith("sleep") for call in engine.calls)


def test_the_log_says_what_was_given_back(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        for _ in range(3):
            rig.sleep(kv_only=True)
            wake(rig.engine, rig.state, KV_CACHE)
    assert caplog.text.count('the engine sleeps while training: KV cache only (sleep="kv")') == 1
    assert caplog.text.count("sleep freed 8.00 GiB") == 1


# Should an engine be built with sleep mode, and can it be?


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TRLPATCH_SLEEP", "UNSLOTH_VLLM_STANDBY", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sleep_mode, "_cuda", lambda: True)
    monkeypatch.setattr(cumem, "allocator", lambda: None)
    return


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"TRLPATCH_SLEEP": "0"}, False),
        ({"TRLPATCH_SLEEP": "1"}, True),
        ({"UNSLOTH_VLLM_STANDBY": "0"}, False),
        ({"UNSLOTH_VLLM_STANDBY": "1"}, True),
        ({"TRLPATCH_SLEEP": "False", "UNSLOTH_VLLM_STANDBY": "1"}, False),
        ({"TRLPATCH_SLEEP": "", "UNSLOTH_VLLM_STANDBY": "0"}, False),
    ],
)
def test_the_default_of_a_builder(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sleep_default() is expected


def test_without_cuda_nothing_is_built_to_sleep_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep_mode, "_cuda", lambda: False)
    assert not sleep_default()
    assert "needs CUDA" in (unsupported_reason() or "")
    monkeypatch.setenv("TRLPATCH_SLEEP", "yes")
    assert sleep_default()
    monkeypatch.setenv("TRLPATCH_SLEEP", "maybe")
    with pytest.raises(InvalidOption, match="TRLPATCH_SLEEP='maybe': expected 1 or 0"):
        sleep_default()


@pytest.mark.usefixtures("cuda")
def test_why_an_engine_cannot_be_built_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported_reason() is None
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:64, Expandable_Segments: True")
        assert f"{name}=max_split_size_mb:64" in (unsupported_reason() or "")
        monkeypatch.setenv(name, "expandable_segments:False")
        assert unsupported_reason() is None
    for used in (0, 3 * GIB):
        instance = SimpleNamespace(get_current_usage=lambda used=used: used)
        monkeypatch.setattr(cumem, "allocator", lambda instance=instance: instance)
        assert bool(unsupported_reason()) == bool(used)
    assert "another engine with sleep mode is alive in this process (3.00 GiB" in (unsupported_reason() or "")


# What status() says.


def test_an_engine_in_one_line(rig: Rig) -> None:
    rig.state.attached = True
    rig.state.why_separate = "quantized"
    assert describe(rig.engine, rig.state) == (
        "tiny, attached; weights separate (quantized); adapter not handed over yet; sleep: has not slept yet; awake"
    )
    rig.state.shared_weights = True
    rig.state.adapter_sync = SimpleNamespace(description="in place")  # type: ignore[assignment]
    rig.sleep()
    assert describe(rig.engine, rig.state) == (
        "tiny, attached; weights shared with the trainer; adapter in place; sleep: KV cache only (the weights are the "
        "trainer's own); asleep now: kv_cache"
    )
    assert describe(rig.engine, rig.state) in describe_engines()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/cache/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/7ae557604adf", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/runs/snapshots/7ae557604adf", "7ae557604adf"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
    ],
)
def test_an_engine_of_a_cached_model_has_its_name(rig: Rig, model: str, name: str) -> None:
    rig.engine.llm_engine.vllm_config.model_config.model = model
    assert describe(rig.engine, rig.state).startswith(f"{name}, ")


def test_a_request_for_an_engine_that_cannot_sleep_and_was_told_to(rig: Rig) -> None:
    rig.sleep()
    rig.engine.llm_engine.vllm_config.model_config.enable_sleep_mode = False
    with pytest.raises(EngineAsleep, match=r"engine that is paused by sleep\(\), which freed no memory.*wake_up\(\)"):
        rig.engine.generate(["a"])


def test_an_engine_that_can_neither_sleep_nor_take_adapters() -> None:
    gc.collect()  # engines of earlier tests
    engine = RecordingEngineStub(lora_rank=None)
    line = describe(engine, state_of(engine))
    assert line == (
        "engine, built by TRL; weights separate; adapter none (built without enable_lora=True); "
        "sleep: none (built without enable_sleep_mode=True); awake"
    )
    alike = describe_engines().count(line)
    engine.unmapped = {WEIGHTS, KV_CACHE}  # as vLLM's executor says after a sleep() by hand, which unmaps nothing
    paused = describe(engine, state_of(engine))
    assert paused.startswith(line.removesuffix("awake"))
    assert paused.endswith(
        "paused by sleep(), which freed no memory, because it was built without "
        "enable_sleep_mode=True; llm.wake_up() ends that"
    )
    assert "asleep" not in paused
    engine.unmapped = set()
    forget(engine)
    assert describe_engines().count(line) == alike - 1


def test_describing_engines_imports_nothing_heavy() -> None:
    code = "import sys; from trlpatch.engine.describe import describe_engines; assert describe_engines() == []; "
    code += "assert not {'torch', 'vllm', 'transformers', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
