"""What an engine refused of one adapter says nothing of another one on the same model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig

from tests.fakes.engine import RecordingEngineStub
from tests.fakes.models import lora_model
from trlpatch.engine import lora_limits
from trlpatch.engine.state import state_of
from trlpatch.policy.adapter import lora_view

pytestmark = pytest.mark.torch


def refused(model: Any, engine: Any) -> str | None:
    view = lora_view(model)
    assert view is not None
    return lora_limits._refused(view, state_of(engine))


def test_a_refusal_is_of_one_adapter_and_one_engine() -> None:
    model, engine, other = lora_model(), RecordingEngineStub(), RecordingEngineStub()
    model.add_adapter("good", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    view = lora_view(model)
    assert view is not None
    lora_limits.refuse(view, state_of(engine), "no LoRA layer for o_proj")
    assert refused(model, engine) == "no LoRA layer for o_proj"
    assert refused(model, other) is None
    model.set_adapter("good")
    assert refused(model, engine) is None
    model.set_adapter("default")
    assert refused(model, engine) == "no LoRA layer for o_proj"
