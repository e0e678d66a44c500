"""Weights of a CPU engine as it is, repacked for its kernels: vLLM's layerwise reload in the place of TRL's push."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")
pytest.importorskip("trl")

import trlpatch  # noqa: E402
from tests.cpu.fast import SMALL  # noqa: E402
from tests.cpu.scenarios import TOLERANCE  # noqa: E402
from tests.cpu.small_grpo import gap, small_grpo  # noqa: E402
from tests.cpu.training import Recorder  # noqa: E402
from trlpatch.engine.attach import detach_engine  # noqa: E402
from trlpatch.engine.describe import describe  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.engine.weights_in_place import reload  # noqa: E402
from trlpatch.errors import EngineMismatch, StaleAdapter  # noqa: E402

pytestmark = pytest.mark.cpu

PROMPT = ["the dog ran in"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied: the output layer has a packed copy of weights that are loaded under the embeddings' name."""
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Any:
    trlpatch.PatchFastRL("grpo")
    return tiny.engine(checkpoint, enable_lora=False)


def sampling() -> Any:
    return vllm.SamplingParams(max_tokens=8, temperature=1.0, logprobs=0, seed=1)


@pytest.mark.parametrize("kind", ["full fine-tuning", "DoRA"])
def test_each_rollout_is_the_policys(kind: str, engine: Any, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = (
        tiny.policy(checkpoint, use_dora=True) if kind == "DoRA" else AutoModelForCausalLM.from_pretrained(checkpoint)
    )
    trlpatch.attach_engine(model, engine, check=False)
    trainer = small_grpo(model, tmp_path)
    recorder = Recorder(trainer, engine)
    trainer.train()
    recorder.close()
    assert max(rollout["gap"] for rollout in recorder.rollouts) < TOLERANCE
    assert "loaded anew (vLLM's layerwise reload, write" in describe(engine, state_of(engine))
    detach_engine(model)


@pytest.mark.parametrize("kind", ["full fine-tuning", "DoRA"])
def test_layers_for_one_adapter_are_loaded_anew(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """They compute with weights of their own, which vLLM's reload does not know."""
    trlpatch.PatchFastRL("grpo")
    model, _ = trlpatch.FastLanguageModel.from_pretrained(
        str(checkpoint), lora_layers="trlpatch", max_lora_rank=8, share_weights=False, **SMALL
    )
    if kind == "DoRA":
        model = trlpatch.FastLanguageModel.get_peft_model(model, r=8, use_dora=True, use_gradient_checkpointing=False)
    engine = model.vllm_engine
    trainer = small_grpo(model, tmp_path)
    recorder = Recorder(trainer, engine)
    if str(vllm.__version__).startswith("0.23"):
        with pytest.raises(
            EngineMismatch, match=r"qkv_proj' is a LoRA layer .* the loader of this vLLM does not know"
        ):
            trainer.train()
        pytest.skip("vLLM 0.23 loads no weights into LoRA layers: refused")
    trainer.train()
    recorder.close()
    assert len(recorder.rollouts) > 1
    assert max(rollout["gap"] for rollout in recorder.rollouts) < TOLERANCE
    assert "loaded anew (vLLM's layerwise reload, write" in describe(engine, state_of(engine))
    detach_engine(model)


def test_an_interrupted_reload_is_never_sampled_from(
    engine: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trlpatch.attach_engine(tiny.policy(checkpoint, use_dora=True), engine, check=False)
    model.fast_generate(PROMPT, sampling())
    tiny.move(model, seed=9)
    values = reload.checkpoint_tensors

    def interrupted(weights: Any) -> Any:
        for number, value in enumerate(values(weights)):
            if number == 9:
                raise KeyboardInterrupt
            yield value

    with monkeypatch.context() as patch:
        patch.setattr(reload, "checkpoint_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fast_generate(PROMPT, sampling())
    assert state_of(engine).torn
    with pytest.raises(StaleAdapter, match="half-written"):
        engine.generate(PROMPT, sampling())
    assert gap(model, model.fast_generate(PROMPT, sampling())[0]) < TOLERANCE
    detach_engine(model)


def test_what_the_loader_does_not_take_is_named_and_never_sampled_from(
    engine: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PEFT model inside another one has parameters of such names."""
    model = trlpatch.attach_engine(tiny.policy(checkpoint, use_dora=True), engine, check=False)
    values = reload.checkpoint_tensors
    with monkeypatch.context() as patch:
        patch.setattr(reload, "checkpoint_tensors", lambda found: ((f"base_model.{n}", v) for n, v in values(found)))
        with pytest.raises(EngineMismatch, match=r"vLLM's loader of Qwen2ForCausalLM does not take .*base_model"):
            model.fast_generate(PROMPT, sampling())
    with pytest.raises(StaleAdapter, match="half-written"):
        engine.generate(PROMPT, sampling())
    assert gap(model, model.fast_generate(PROMPT, sampling())[0]) < TOLERANCE
    detach_engine(model)
