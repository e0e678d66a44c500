"""A policy that is more than its adapter: no rollout of the adapter alone, or of the base as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub  # noqa: E402
from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from tests.fakes.owners import Since110  # noqa: E402
from trlpatch.engine import lora_limits  # noqa: E402
from trlpatch.engine.attach import attach_engine, detach_engine  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import NotAnEngine, StaleAdapter  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def engine() -> RecordingEngineStub:
    stub = RecordingEngineStub()
    state_of(stub).adapter_sync = RecordingAdapterSync()
    return stub


@pytest.fixture
def model(engine: Any) -> Any:
    return attach_engine(lora_model(), engine)


def reason(model: Any, engine: Any) -> str:
    view = lora_view(model)
    assert view is not None
    return lora_limits.unsupported_reason(view, engine) or ""


def write(parameter: Any) -> None:
    with torch.no_grad():
        parameter.add_(1.0)


def merge_an_earlier_adapter(model: Any) -> Any:
    """Into layers that the adapter in training does not stand on."""
    base = model.unload()
    earlier = get_peft_model(
        base, LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    return lora_model(earlier.merge_and_unload())


BESIDE = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize("path", BESIDE)
def test_what_is_trained_beside_the_adapter_is_pushed_in_full(path: str, engine: Any) -> None:
    base = attach_engine(base_model(), engine)
    model = lora_model(base)
    owner = Since110(model, engine, sleep=False)
    owner.batch()
    trained = next(parameter for name, parameter in base.named_parameters() if name.replace(".base_layer", "") == path)
    trained.requires_grad_(True)
    assert f"{path!r} is trained beside it" in reason(model, engine)
    owner.batch()
    assert [call for call in engine.calls if "generate" in call or "load" in call] == [
        "generate(v1, checkpoint)",
        "load_weights",
        "generate(base, policy)",
    ]


@pytest.mark.parametrize("path", BESIDE[:3])
def test_what_was_changed_beside_the_adapter_is_noticed(path: str, model: Any, engine: Any) -> None:
    assert not reason(model, engine)
    write(dict(model.get_base_model().named_parameters())[path])
    path = path if "norm" in path else path.removesuffix(".weight")  # matrices are named by their layers
    assert f"{path!r} is not what it was when the engine was attached" in reason(model, engine)


def test_an_earlier_adapter_merged_into_other_layers_is_noticed(model: Any, engine: Any) -> None:
    other = merge_an_earlier_adapter(model)
    assert "up_proj' is not what it was" in reason(other, engine)


def test_another_adapter_merged_beside_the_active_one(model: Any, engine: Any) -> None:
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    model.merge_adapter(["other"])
    assert "the adapter 'other', which is not active, is merged into 'model.layers.0" in reason(model, engine)
    model.unmerge_adapter()
    assert "'other'" not in reason(model, engine)


def test_the_active_adapter_merged_is_the_policy_all_the_same(model: Any, engine: Any) -> None:
    randomize(model)
    model.merge_adapter()
    assert not reason(model, engine)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "merged": lambda model: model.merge_and_unload(),
    "trained": lambda model: (write(model.base_model.model.model.norm.weight), model.unload())[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_without_an_adapter_is_not_its_untrained_base(change: str, model: Any, engine: Any) -> None:
    randomize(model)
    model.fast_generate(["a"])
    changed = CHANGES[change](model)
    with pytest.raises(StaleAdapter, match=r"q_proj|norm\.weight"):
        changed.fast_generate(["a"])
    changed.fast_generate(["a"], lora_request=None)
    assert [None if request is None else request.lora_name for request in engine.requests] == ["v1", None]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_no_more_its_untrained_base(
    shared: bool, change: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trlpatch.engine.attach.verify_overlap", lambda *_: None)
    model = attach_engine(lora_model(), engine, shared_weights=shared)
    randomize(model)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert not reason(twin, engine)
    twin.unload().fast_generate(["a"])
    assert engine.requests == [None], "as it was attached"
    changed = CHANGES[change](copy.deepcopy(model))
    with pytest.raises(StaleAdapter, match=r"q_proj|norm\.weight"):
        changed.fast_generate(["a"])
    assert "is not what it was" in reason(merge_an_earlier_adapter(copy.deepcopy(model)), engine)


def test_a_copy_of_a_model_that_was_detached_is_not_believed(model: Any, engine: Any) -> None:
    twin = copy.deepcopy(model).merge_and_unload()
    detach_engine(model)
    with pytest.raises(NotAnEngine, match="a copy of a model that the engine was detached from"):
        twin.fast_generate(["a"])
    assert engine.requests == []


def test_a_model_as_it_was_attached_needs_no_adapter(model: Any, engine: Any) -> None:
    model.unload().fast_generate(["a"])
    assert engine.requests == [None]


@pytest.fixture
def sharing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("trlpatch.engine.attach.verify_overlap", lambda *_: None)
    return attach_engine(lora_model(), engine, shared_weights=True)


def test_a_second_model_takes_nothing_from_the_one_that_shares(sharing: Any, engine: Any) -> None:
    second = attach_engine(lora_model(), engine)
    assert state_of(engine).shared_weights
    assert second.load_lora().lora_name == "v1"
    detach_engine(second)
    assert state_of(engine).published is None, "of a model that is no longer attached"
    assert state_of(engine).shared_weights
    assert state_of(engine).guards is not None
    assert sharing.vllm_engine is engine
    assert detach_engine(sharing) is engine
    assert not state_of(engine).shared_weights


def test_detaching_a_copy_leaves_the_model_its_engine(sharing: Any, engine: Any) -> None:
    state = state_of(engine)
    twin = copy.deepcopy(sharing)
    assert detach_engine(twin) is engine
    assert not hasattr(twin.get_base_model(), "vllm_engine")
    assert state_of(engine) is state
    assert state.shared_weights


def test_a_second_models_base_is_compared_although_another_shares(sharing: Any, engine: Any) -> None:
    second = attach_engine(lora_model(), engine)
    assert not reason(second, engine)
    write(second.get_base_model().model.norm.weight)
    assert "is not what it was" in reason(second, engine)
