"""One model on both sides: weights beside the adapter, for an engine that TRL built, and weights after a push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub  # noqa: E402
from tests.fakes.fused import FusedModelStub, engine_over  # noqa: E402
from tests.fakes.models import base_model, lora_model  # noqa: E402
from tests.fakes.owners import Since110  # noqa: E402
from tests.gpu.sharing_archs import checkpoint  # noqa: E402
from trlpatch.engine import probes  # noqa: E402
from trlpatch.engine.attach import attach_engine  # noqa: E402
from trlpatch.engine.beside_weights import beside_mismatch  # noqa: E402
from trlpatch.engine.sharing import logits  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import EngineMismatch, StaleAdapter  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.torch


def both(name: str, directory: Path, *, dtype: str = "float32") -> tuple[Any, Any]:
    """(the model as it was loaded, an engine of the same checkpoint with its weights fused)."""
    from transformers import AutoModelForCausalLM

    path = checkpoint(name, directory, dtype=dtype)
    model, inside = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for _ in range(2))
    tied = inside.get_output_embeddings().weight is inside.get_input_embeddings().weight
    return model, engine_over(FusedModelStub(inside, tied=tied), str(path))


def mismatch(model: Any, engine: Any) -> str | None:
    view = lora_view(lora_model(model))
    assert view is not None
    return beside_mismatch(view, engine)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma3"])
@pytest.mark.parametrize("cast", [None, "float32"])
def test_the_same_weights_are_recognised_also_after_a_cast(name: str, cast: str | None, tmp_path: Path) -> None:
    model, engine = both(name, tmp_path, dtype="bfloat16" if cast else "float32")
    assert mismatch(model.float(), engine) is None


@pytest.mark.parametrize(
    "path",
    [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ],
)
def test_a_weight_without_an_adapter_that_differs_is_named(path: str, tmp_path: Path) -> None:
    model, engine = both("llama", tmp_path)
    with torch.no_grad():
        model.get_parameter(path)[-1:] += 0.5  # a row that was made anew
    assert f"{path!r} differs" in (mismatch(model, engine) or "")


def test_another_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, engine = both("llama", tmp_path)
    size = model.config.vocab_size
    monkeypatch.setattr(probes, "vocabulary_size", lambda llm: size + 2)
    assert mismatch(model, engine) == f"the model has a vocabulary of {size} tokens, the engine of {size + 2}"
    with pytest.raises(EngineMismatch, match=f"vocabulary of {size} tokens, the engine of {size + 2}"):
        attach_engine(model, engine)
    assert not hasattr(model, "vllm_engine")
    assert attach_engine(model, engine, check=False) is model


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_only_the_config_ties_is_named(
    tied: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, engine = both("qwen2-tied", tmp_path)
    monkeypatch.setattr(logits, "_engine_logprobs", lambda llm, prompts: [[0.0] * (len(ids) - 1) for ids in prompts])
    if not tied:  # as transformers 5 loads a checkpoint whose lm_head.weight has other values
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.03)
    with pytest.raises(EngineMismatch, match="check that both come from one checkpoint") as refused:
        logits.compare_logits(model, engine)
    assert ("set it in the checkpoint's config.json to what was trained" in str(refused.value)) is not tied


def test_an_engine_with_other_norms_gets_the_whole_policy_pushed(caplog: pytest.LogCaptureFixture) -> None:
    """As TRL builds it from `name_or_path`, for a model that was changed since."""
    inside = FusedModelStub(base_model(), tied=False)
    engine = RecordingEngineStub()
    engine.llm_engine.model_executor.driver_worker.model_runner.get_model = lambda: inside
    state_of(engine).adapter_sync = RecordingAdapterSync()
    model = base_model()
    same = Since110(lora_model(base_model()), engine, sleep=False)
    same.batch()
    assert engine.calls[-1] == "generate(v1, checkpoint)"
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    Since110(lora_model(model), engine, sleep=False).batch()
    assert [call for call in engine.calls if "cache" not in call][-2:] == ["load_weights", "generate(base, policy)"]
    assert "'model.norm.weight' differs, which has no adapter" in caplog.text


def test_fast_generate_after_a_push_answers_for_the_weights_that_were_pushed() -> None:
    engine = RecordingEngineStub()
    model, other = attach_engine(base_model(), engine), attach_engine(base_model(), engine)
    Since110(model, engine, sleep=False).batch()
    model.fast_generate(["a"])
    with pytest.raises(StaleAdapter, match="they were another model's"):
        other.fast_generate(["a"])
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(StaleAdapter, match=r"'lm_head' has changed since then"):
        model.fast_generate(["a"])
    model.fast_generate(["a"], lora_request=None)
    assert [call for call in engine.calls if "generate" in call] == ["generate(base, policy)"] * 3
