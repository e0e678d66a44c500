"""Weights written into a real engine in place: GRPO of what no LoRA request carries, and of merged adapters.

vLLM's CPU backend repacks linear weights; it is told not to here, so that they are as on CUDA.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")
pytest.importorskip("trl")

import trlpatch  # noqa: E402
from tests.cpu.scenarios import TOLERANCE  # noqa: E402
from tests.cpu.small_grpo import adapter_of, gap, small_grpo  # noqa: E402
from tests.cpu.training import Recorder  # noqa: E402
from trlpatch.engine.attach import detach_engine  # noqa: E402
from trlpatch.engine.describe import describe  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.engine.weights_in_place import merge  # noqa: E402
from trlpatch.errors import EngineMismatch, StaleAdapter  # noqa: E402
from trlpatch.options import Options, activate  # noqa: E402

pytestmark = pytest.mark.cpu

PROMPT = ["the dog ran in"]


@pytest.fixture(scope="module", autouse=True)
def vllm_as_on_cuda() -> Iterator[None]:
    """Keep linear weights as they are loaded."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "_supports_onednn", False)
        patch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path, vllm_as_on_cuda: None) -> Any:
    trlpatch.PatchFastRL("grpo")
    return tiny.engine(checkpoint)


@pytest.fixture
def asked() -> Iterator[Callable[[str], None]]:
    """Train with another `adapter=`."""
    yield lambda word: activate(Options("grpo", adapter=word))  # type: ignore[arg-type]
    activate(Options("grpo"))


def sampling() -> Any:
    return vllm.SamplingParams(max_tokens=8, temperature=1.0, logprobs=0, seed=1)


def full(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


KINDS: dict[str, Callable[[Path], Any]] = {
    "full fine-tuning": full,
    "DoRA": lambda checkpoint: tiny.policy(checkpoint, use_dora=True),
    "modules_to_save": lambda checkpoint: tiny.policy(checkpoint, modules_to_save=["lm_head", "embed_tokens"]),
    "biases": lambda checkpoint: tiny.policy(checkpoint, bias="all"),
    "rank above the engine's": lambda checkpoint: tiny.policy(checkpoint, r=32),
}


def trained(model: Any, engine: Any, directory: Path, **given: Any) -> list[dict[str, Any]]:
    trainer = small_grpo(model, directory, **given)
    recorder = Recorder(trainer, engine)
    try:
        trainer.train()
    finally:
        recorder.close()
    return recorder.rollouts


@pytest.mark.parametrize("kind", KINDS)
def test_each_rollout_is_the_policys(
    kind: str, engine: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trlpatch.attach_engine(KINDS[kind](checkpoint), engine, check=False)  # another one trained on it before
    try:
        rollouts = trained(model, engine, tmp_path)
        assert [rollout["adapter"] for rollout in rollouts] == [None] * 3
        assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE
        state = state_of(engine)
        assert (state.policy_location, state.torn) == ("weights", False)
        assert "written in place (torch, write" in describe(engine, state_of(engine))
        # The same without the writes: the gap is seen.
        monkeypatch.setattr(merge, "write", lambda *_: None)
        monkeypatch.setattr(merge, "copy_all", lambda *_: None)
        control = trained(model, engine, tmp_path)
        assert max(rollout["gap"] for rollout in control) > 30 * TOLERANCE
    finally:
        detach_engine(model)


def test_the_weights_are_those_that_trl_pushes(
    engine: Any, checkpoint: Path, tmp_path: Path, asked: Callable[[str], None]
) -> None:
    module = engine.llm_engine.model_executor.driver_worker.model_runner.get_model()
    found = []
    for way in ("auto", "off"):
        asked(way)
        model = trlpatch.attach_engine(full(checkpoint), engine, check=False)
        try:
            trained(model, engine, tmp_path)
        except EngineMismatch:
            assert way == "off"
            detach_engine(model)
            pytest.skip("TRL's push does not work with this vLLM's LoRA layers: refused")
        found.append({name: value.detach().clone() for name, value in module.named_parameters()})
        assert state_of(engine).policy_location == {"auto": "weights", "off": "policy"}[way]
        detach_engine(model)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_plain_adapter_is_merged_when_asked(
    engine: Any, checkpoint: Path, tmp_path: Path, asked: Callable[[str], None]
) -> None:
    asked("merge")
    model = trlpatch.attach_engine(tiny.policy(checkpoint), engine, check=False)
    rollouts = trained(model, engine, tmp_path)
    assert [rollout["adapter"] for rollout in rollouts] == [None] * 3
    assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE
    # By hand: the policy, the base model, and the policy again.
    tiny.move(model, seed=5)
    policy = model.fast_generate(PROMPT, sampling())[0]
    assert adapter_of(policy) is None
    assert gap(model, policy) < TOLERANCE
    base = model.fast_generate(PROMPT, sampling(), lora_request=None)[0]
    assert gap(model, base) > 30 * TOLERANCE
    with model.disable_adapter():
        assert gap(model, base) < TOLERANCE
        assert gap(model, model.fast_generate(PROMPT, sampling())[0]) < TOLERANCE
    assert trlpatch.lora_request(model) is None
    assert gap(model, engine.generate(PROMPT, sampling())[0]) < TOLERANCE
    assert "of the weights under the adapter round back" in describe(engine, state_of(engine))
    # An adapter of another trainer would be added to the merged one.
    model.save_lora(tmp_path / "saved")
    with pytest.raises(StaleAdapter, match="added to what is merged already"):
        engine.generate(PROMPT, sampling(), lora_request=model.load_lora(str(tmp_path / "saved")))
    detach_engine(model)
    again = trlpatch.attach_engine(tiny.policy(checkpoint), engine)  # compares: the base weights are back
    detach_engine(again)


def test_an_interrupted_write_is_never_sampled_from(
    engine: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trlpatch.attach_engine(tiny.policy(checkpoint, use_dora=True), engine, check=False)
    model.fast_generate(PROMPT, sampling())
    tiny.move(model, seed=9)
    write, writes = merge.write, []

    def interrupted(weight: Any, target: Any) -> None:
        writes.append(weight)
        if len(writes) == 5:
            raise KeyboardInterrupt
        write(weight, target)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fast_generate(PROMPT, sampling())
    with pytest.raises(StaleAdapter, match="half-written"):
        engine.generate(PROMPT, sampling())
    assert "half-written" in describe(engine, state_of(engine))
    output = model.fast_generate(PROMPT, sampling())[0]
    assert gap(model, output) < TOLERANCE
    assert gap(model, engine.generate(PROMPT, sampling())[0]) < TOLERANCE
    detach_engine(model)
