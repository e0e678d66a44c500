"""`model.fast_generate` on an engine that sleeps: woken for the call, asleep again as it was."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub
from tests.fakes.models import base_model, lora_model
from trlpatch.engine.attach import attach_engine
from trlpatch.engine.sleep import put_to_sleep
from trlpatch.engine.state import state_of
from trlpatch.errors import StaleAdapter

pytestmark = pytest.mark.torch

WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "the live adapter": (lora_model, {}),
    "the base model": (lora_model, {"lora_request": None}),
    "no adapter": (base_model, {}),
}


@pytest.fixture
def engine() -> RecordingEngineStub:
    stub = RecordingEngineStub(sleep=True)
    state_of(stub).adapter_sync = RecordingAdapterSync()
    return stub


@pytest.mark.parametrize("kv_only", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_slept_sleeps_again(way: str, kv_only: bool, engine: Any) -> None:
    make, given = WAYS[way]
    model, state = attach_engine(make(), engine), state_of(engine)
    assert put_to_sleep(engine, state, 1, kv_only=kv_only)
    slept, method = set(engine.unmapped), state.sleep_method
    assert slept == ({"kv_cache"} if kv_only else {"weights", "kv_cache"})
    model.fast_generate(["a"], **given)
    assert engine.unmapped == slept
    assert state.sleep_method == method
    assert len(engine.requests) == 1


def test_also_after_a_failure_and_not_when_it_was_awake(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = attach_engine(lora_model(), engine), state_of(engine)
    model.fast_generate(["a"])
    assert engine.unmapped == set()
    put_to_sleep(engine, state, 1)

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", fails)
    with pytest.raises(KeyboardInterrupt):
        model.fast_generate(["a"])
    assert engine.unmapped == {"weights", "kv_cache"}


@pytest.mark.parametrize("given", [{}, {"lora_request": None}])
def test_weights_that_a_sleep_discarded_answer_nobody(given: dict[str, Any], engine: Any) -> None:
    model, state = attach_engine(lora_model(), engine), state_of(engine)
    put_to_sleep(engine, state, 2)
    with pytest.raises(StaleAdapter, match="discarded the engine's weights"):
        model.fast_generate(["a"], **given)
    assert engine.requests == []
