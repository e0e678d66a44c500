"""KV-only sleep of a real engine: vLLM's LLM, engine core, executor, GPU worker's sleep and CuMemAllocator class.

Only the driver is a stub, and what the model computes with is ordinary CPU memory.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.version import Version

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

from tests.fakes.allocator import DeviceStub  # noqa: E402
from tests.fakes.sleep_rig import ALL, KV, real_module  # noqa: E402
from trlpatch.engine import guards, probes  # noqa: E402
from trlpatch.engine.memory import device  # noqa: E402
from trlpatch.engine.probes import KV_CACHE, WEIGHTS  # noqa: E402
from trlpatch.engine.sleep import put_to_sleep, wake  # noqa: E402
from trlpatch.engine.state import forget, state_of  # noqa: E402
from trlpatch.errors import EngineAsleep, EngineBusy, NotEnoughMemory, SharedWeights  # noqa: E402

pytestmark = [
    pytest.mark.cpu,
    # tests/gpu/sleep_cycles.py has the same on a device, with either.
    pytest.mark.skipif(
        Version(importlib.metadata.version("vllm")) < Version("0.28"),
        reason="vLLM 0.23 asks torch.cuda for memory, 0.28 asks torch.accelerator, which can be stood in for on a CPU",
    ),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.engine(tiny.checkpoint(tmp_path_factory.mktemp("model")), max_num_seqs=4)


@pytest.fixture
def driver(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceStub]:
    """The CPU engine sleeps as a GPU engine does, on a device that is accounted for."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    driver = DeviceStub(unit=4096)
    allocator = real_module(monkeypatch, driver).CuMemAllocator.instance
    monkeypatch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: allocator)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda where=None: (driver.free, driver.total))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda where=None: driver.synchronize())
    for name, found in (("synchronize", driver.synchronize), ("free_up", driver.free_up)):
        monkeypatch.setattr(device, name, found)
    for name in ("sleep", "wake_up", "discard"):  # the last one from 0.31 on
        if hasattr(Worker, name):
            monkeypatch.setattr(CPUWorker, name, getattr(Worker, name))
    monkeypatch.setattr(probes.model_config(llm), "enable_sleep_mode", True)
    guards.install(llm, state_of(llm))
    yield driver
    llm.wake_up()
    forget(llm)


PROMPT = {"prompt_token_ids": [number % 60 + 5 for number in range(200)]}


def roll_out(llm: Any) -> Any:
    params = vllm.SamplingParams(max_tokens=4, temperature=0.0, logprobs=0)
    return llm.generate([PROMPT], params, use_tqdm=False)[0]


def mapped(driver: DeviceStub) -> int:
    return sum(driver.mapped.values()) // driver.unit


def test_cycles_on_the_real_engine(llm: Any, driver: DeviceStub) -> None:
    state = state_of(llm)
    state.shared_weights = True
    first = roll_out(llm)
    assert roll_out(llm).num_cached_tokens > 0, "the prefix cache is in use"
    for by_hand in (False, True, False):
        driver.busy = True
        assert put_to_sleep(llm, state, 1)
        assert mapped(driver) == ALL - KV
        assert llm.llm_engine.is_sleeping()
        with pytest.raises(EngineAsleep, match="kv_cache unmapped"):
            roll_out(llm)
        assert not llm.llm_engine.has_unfinished_requests()
        llm.wake_up(tags=["weights"])
        assert mapped(driver) == ALL - KV
        if by_hand:
            llm.wake_up()
        else:
            assert wake(llm, state, KV_CACHE)
        assert mapped(driver) == ALL
        assert not llm.llm_engine.is_sleeping()
        again = roll_out(llm)
        assert again.num_cached_tokens == 0, "what it would have reused is gone"
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
    with pytest.raises(SharedWeights):
        llm.sleep()
    assert not llm.llm_engine.is_sleeping()
    roll_out(llm)


def test_vllms_own_levels_stay_right(llm: Any, driver: DeviceStub) -> None:
    state = state_of(llm)
    for wake_up in (llm.wake_up, lambda: [llm.wake_up(tags=[tag]) for tag in (WEIGHTS, KV_CACHE)]):
        state.backend.discard_kv_cache()
        llm.sleep(level=1)
        assert mapped(driver) == 0
        with pytest.raises(EngineAsleep):
            roll_out(llm)
        wake_up()
        assert mapped(driver) == ALL
        assert [driver.contents[1000], driver.contents[1001]] == ["weights 0", "weights 1"]
        roll_out(llm)
    llm.sleep(level=0)
    llm.wake_up(tags=["scheduling"])
    roll_out(llm)


def test_a_failed_wake_leaves_the_real_engine_asleep(llm: Any, driver: DeviceStub) -> None:
    state = state_of(llm)
    state.backend.discard_kv_cache()
    driver.refuse_after = 1
    with pytest.raises(NotEnoughMemory):
        wake(llm, state, KV_CACHE)
    assert mapped(driver) == ALL - KV
    with pytest.raises(EngineAsleep):
        roll_out(llm)
    driver.refuse_after = None
    assert wake(llm, state, KV_CACHE)
    roll_out(llm)


def test_an_unfinished_request_keeps_the_real_engine_awake(llm: Any, driver: DeviceStub) -> None:
    llm.llm_engine.add_request("left over", PROMPT, vllm.SamplingParams(max_tokens=4))
    llm.llm_engine.step()
    with pytest.raises(EngineBusy):
        state_of(llm).backend.discard_kv_cache()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    state_of(llm).backend.discard_kv_cache()
    assert mapped(driver) == ALL - KV
