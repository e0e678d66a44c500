"""An engine whose base weights are not the trainer's. The real counterpart runs on a GPU: the CPU backend repacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingEngineStub  # noqa: E402
from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from trlpatch.engine.attach import attach_engine  # noqa: E402
from trlpatch.engine.backend import backend_of  # noqa: E402
from trlpatch.engine.lora_limits import unsupported_reason  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.torch


def engine_with(model: Any, *, dtype: Any = torch.float32, wrapped: bool = True) -> RecordingEngineStub:
    """An engine holding the weights as vLLM does: q, k and v in one tensor, LoRA wrappers around linear layers."""
    weights, packed = {}, {}
    infix = ".base_layer" if wrapped else ""
    for index, layer in enumerate(model.model.layers):
        path = f"model.layers.{index}.self_attn"
        members = [f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        packed[f"{path}.qkv_proj"] = members
        parts = [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
        weights[f"{path}.qkv_proj{infix}.weight"] = torch.cat(parts).to(dtype)
        weights[f"{path}.o_proj{infix}.weight"] = layer.self_attn.o_proj.weight.detach().to(dtype).clone()
    inside = SimpleNamespace(
        named_parameters=lambda: weights.items(), named_modules=lambda remove_duplicate=True: iter(())
    )
    manager = SimpleNamespace(packed_modules=packed, modules={})
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager), get_model=lambda: inside)
    stub = RecordingEngineStub()
    stub.llm_engine.model_executor.driver_worker = SimpleNamespace(model_runner=runner)
    stub.inside = weights  # type: ignore[attr-defined]
    return stub


def verdict(model: Any, engine: Any) -> str | None:
    view = lora_view(model)
    assert view is not None
    return backend_of(engine).base_mismatch(view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_same_base_is_recognised(dtype: Any, wrapped: bool) -> None:
    base = base_model()
    engine = engine_with(base, dtype=dtype, wrapped=wrapped)
    model = lora_model(base)
    randomize(model)
    assert verdict(model, engine) is None


def test_a_merged_earlier_adapter_is_noticed() -> None:
    base = base_model()
    engine = engine_with(base)
    earlier = lora_model(base, target_modules=["v_proj"])
    randomize(earlier)
    found = verdict(lora_model(earlier.merge_and_unload()), engine)
    assert found is not None
    assert "qkv_proj' differs from model.layers.0.self_attn.q_proj" in found


def test_float16_against_bfloat16_is_rounding() -> None:
    base = base_model()
    engine = engine_with(base, dtype=torch.bfloat16)
    assert verdict(lora_model(base.to(torch.float16)), engine) is None


def test_permuted_and_incomparable_weights_pass() -> None:
    base = base_model()
    engine = engine_with(base)
    for name, weight in list(engine.inside.items()):  # type: ignore[attr-defined]
        engine.inside[name] = weight.flip(0)  # type: ignore[attr-defined]
    model = lora_model(base)
    assert verdict(model, engine) is None
    for name in list(engine.inside):  # type: ignore[attr-defined]
        engine.inside[name] = torch.empty(0)  # type: ignore[attr-defined]  # repacked, as on the CPU backend
    assert verdict(model, engine) is None
    assert verdict(model, RecordingEngineStub()) is None


def test_merged_training_layers_are_not_compared() -> None:
    base = base_model()
    engine = engine_with(base)
    model = lora_model(base)
    randomize(model)
    model.merge_adapter()
    assert verdict(model, engine) is None


def reason(model: Any, engine: Any) -> str | None:
    view = lora_view(model)
    assert view is not None
    return unsupported_reason(view, engine)


def test_an_adapter_that_is_merged_after_a_training_is_noticed() -> None:
    base = base_model()
    engine = engine_with(base)
    first = lora_model(base)
    randomize(first)
    assert reason(first, engine) is None
    second = reason(lora_model(first.merge_and_unload()), engine)
    assert second is not None
    assert "qkv_proj' differs from" in second


def test_the_weights_are_compared_once_as_long_as_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers forward and a training step leave the base alone."""
    from trlpatch.engine.state import state_of

    base = base_model()
    engine, model = engine_with(base), lora_model(attach_engine(base, RecordingEngineStub()))
    compared = []
    backend = state_of(engine).backend
    monkeypatch.setattr(backend, "base_mismatch", lambda view: compared.append(view))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(3):
        assert reason(model, engine) is None
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
        optimizer.step()
    assert len(compared) == 1
    with torch.no_grad():
        base.model.layers[1].self_attn.o_proj.weight.add_(0)
    assert reason(model, engine) is None
    assert len(compared) == 2, "a write that torch counts"


@pytest.mark.parametrize("change", ["written through .data", "other storage", "merged for a while", "fused AdamW"])
@pytest.mark.parametrize("attached", [False, True])
def test_weights_that_change_below_a_standing_adapter_are_noticed(change: str, attached: bool) -> None:
    """No module is registered, and the version counters stand still."""
    base = base_model()
    engine = engine_with(base)
    if attached:
        engine = RecordingEngineStub()
        attach_engine(base, engine)
    model = lora_model(base)
    randomize(model)
    view = lora_view(model)
    assert reason(model, engine) is None
    weight = base.model.layers[0].self_attn.o_proj.base_layer.weight
    if change == "written through .data":
        weight.data.mul_(1.5)
    elif change == "other storage":
        weight.data = weight.data * 1.5
    elif change == "merged for a while":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    found = reason(model, engine)
    assert view is not None
    assert lora_view(model).found is view.found  # type: ignore[union-attr]
    assert found is not None
    assert ("was attached with" if attached else "differs from") in found


def test_an_adapter_that_is_merged_is_noticed_where_the_engines_weights_cannot_be_compared() -> None:
    engine = RecordingEngineStub()
    first = lora_model(attach_engine(base_model(), engine))
    randomize(first)
    assert reason(first, engine) is None
    second = reason(lora_model(first.merge_and_unload()), engine)
    assert second is not None
    assert "q_proj' is not the one that the engine was attached with" in second


def test_what_leaves_the_base_weights_alone_is_no_reason() -> None:
    engine = RecordingEngineStub()
    first = lora_model(base_model())
    randomize(first)
    attach_engine(first, engine)
    assert reason(first, engine) is None
    assert reason(lora_model(first.unload()), engine) is None, "taken away, not merged"


def test_another_dtype_is_passed_over() -> None:
    engine = RecordingEngineStub()
    base = attach_engine(base_model(), engine)
    assert reason(lora_model(base.to(torch.float16)), engine) is None


def test_an_adapter_that_is_merged_for_a_while_is_no_reason() -> None:
    engine = RecordingEngineStub()
    model = lora_model(base_model())
    randomize(model)
    model.merge_adapter()
    attach_engine(model, engine)
    assert reason(model, engine) is None
    model.unmerge_adapter()
    assert reason(lora_model(model.unload()), engine) is None
