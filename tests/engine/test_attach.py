from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import trlpatch  # noqa: E402
from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub  # noqa: E402
from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from trlpatch.engine import stock_trainers  # noqa: E402
from trlpatch.engine.attach import attach_engine, attached_engine, detach_engine  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, EngineMismatch, NotAnEngine  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def engine() -> RecordingEngineStub:
    stub = RecordingEngineStub()
    state_of(stub).adapter_sync = RecordingAdapterSync()
    return stub


def test_the_engine_is_visible_through_peft_before_and_after(engine: Any) -> None:
    model = lora_model()
    assert attach_engine(model, engine) is model
    assert model.vllm_engine is engine
    assert attached_engine(model) is engine
    assert attached_engine(model.merge_and_unload()) is engine
    plain = attach_engine(base_model(), engine)
    assert attached_engine(lora_model(plain)) is engine
    assert state_of(engine).attached


def test_what_carries_no_engine(engine: Any) -> None:
    assert attached_engine("some/model") is None
    assert attached_engine(None) is None
    assert attached_engine(base_model()) is None
    model = base_model()
    model.vllm_engine = "not an engine"
    assert attached_engine(model) is None


def test_a_stock_trainer_of_this_process_is_told_of(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stock_trainers, "_watch", stock_trainers._Watch())  # it says a thing once
    monkeypatch.setattr(stock_trainers, "in_force", lambda: False)
    monkeypatch.setitem(sys.modules, "trl.trainer.rloo_trainer", ModuleType("trl.trainer.rloo_trainer"))
    monkeypatch.delitem(sys.modules, "trl.trainer.grpo_trainer", raising=False)
    attach_engine(base_model(), engine)
    assert "a stock RLOOTrainer does not use that engine" in caplog.text


def test_a_deep_copy_shares_the_engine(engine: Any) -> None:
    model = attach_engine(lora_model(), engine)
    twin = copy.deepcopy(model)
    assert twin.vllm_engine is engine
    assert twin.get_base_model() is not model.get_base_model()
    randomize(twin)
    assert twin.load_lora().lora_name == "v1"
    sent = state_of(engine).adapter_sync.published[-1].tensors  # type: ignore[union-attr]
    assert any(t.abs().sum() > 0 for name, t in sent.items() if "lora_B" in name), "the copy's own weights are sent"


def test_detaching(engine: Any) -> None:
    model = attach_engine(lora_model(), engine)
    assert detach_engine(model) is engine
    assert attached_engine(model) is None
    assert not any(hasattr(model, name) for name in ("load_lora", "save_lora", "fast_generate"))
    assert not state_of(engine).attached
    assert detach_engine(model) is None
    assert copy.deepcopy(engine) is not engine
    assert state_of(engine).guards is None, "nothing of ours is on the engine"
    assert trlpatch.detach_engine is detach_engine


@pytest.mark.parametrize(
    ("model", "llm", "says"),
    [
        ("some/model", RecordingEngineStub(), "must be a loaded transformers or PEFT model, got str"),
        (None, RecordingEngineStub(), "got NoneType"),
        (torch.nn.Linear(1, 1), object(), "must be a vllm.LLM"),
    ],
)
def test_bad_arguments(model: Any, llm: Any, says: str) -> None:
    with pytest.raises(NotAnEngine, match=says):
        attach_engine(model, llm)


def test_a_sleeping_engine_is_refused() -> None:
    engine = RecordingEngineStub(sleep=True)
    engine.sleep()
    with pytest.raises(EngineMismatch, match="kv_cache, weights"):
        attach_engine(base_model(), engine)


def test_load_lora_follows_the_model(engine: Any) -> None:
    model = attach_engine(lora_model(), engine)
    first = model.load_lora()
    assert model.load_lora("any name", load_tensors=True) is first
    randomize(model)
    assert model.load_lora() is not first


@pytest.mark.cpu
def test_load_lora_reads_a_saved_adapter(engine: Any, tmp_path: Path) -> None:
    model = attach_engine(lora_model(), engine)
    with pytest.raises(ValueError, match=r"expected a directory with adapter_config\.json"):
        model.load_lora(str(tmp_path))
    model.save_lora(tmp_path)
    request = model.load_lora(str(tmp_path))
    assert request.lora_path == str(tmp_path.resolve())
    assert model.load_lora(str(tmp_path)).lora_int_id == request.lora_int_id
    assert state_of(engine).adapter_sync.published == []  # type: ignore[union-attr]


def test_fast_generate_uses_the_live_adapter_unless_told_otherwise(engine: Any) -> None:
    model = attach_engine(lora_model(), engine)
    model.fast_generate(["a"])
    model.fast_generate(["a"], lora_request=None)
    attach_engine(base_model(), engine).fast_generate(["a"])
    assert [None if request is None else request.lora_name for request in engine.requests] == ["v1", None, None]


def test_a_model_without_an_adapter_has_no_request(engine: Any) -> None:
    model = attach_engine(base_model(), engine)
    with pytest.raises(AdapterNotExpressible, match="it has no PEFT adapter"):
        model.load_lora()
