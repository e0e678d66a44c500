"""Requests without an adapter on a stub engine; tests/cpu/test_own_rollouts.py makes them on a real one."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync
from tests.fakes.models import lora_model, randomize
from tests.hooks.test_rollout_func import Engine
from trlpatch import hooks
from trlpatch.engine.attach import attach_engine
from trlpatch.engine.state import state_of
from trlpatch.errors import StaleAdapter
from trlpatch.hooks import bare_requests

pytestmark = pytest.mark.torch


class Trainer:
    """A trainer of TRL's, as far as an engine sees one."""

    __module__ = "trl.trainer.grpo_trainer"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vllm_mode = "colocate"
        self.llm = hooks.engine(self, model, None)()  # type: ignore[arg-type]

    def sync_weights(self) -> None:
        hooks.hand_over(self)

    def train(self, does: Callable[[], Any]) -> Any:
        """As TRL calls what a user gives it."""
        return does()


class Subclass(Trainer):
    """A user's, with rollouts of its own."""

    __module__ = "__main__"

    def own_rollout(self) -> None:
        self.llm.generate(["a", "b"])


def trained(cls: type[Trainer] = Trainer, engine: Engine | None = None) -> Any:
    engine = engine or Engine()
    state_of(engine).adapter_sync = RecordingAdapterSync()
    made = cls(attach_engine(lora_model(), engine))
    made.sync_weights()
    return made


def names(trainer: Any) -> list[str | None]:
    return [None if request is None else request.lora_name for request in trainer.llm.requests]


def test_what_a_trainer_calls_gets_the_adapter_as_it_is_once_per_call(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained()
    trainer.train(lambda: trainer.llm.generate(["a", "b"]))
    randomize(trainer.model, seed=7)
    trainer.train(lambda: trainer.llm.generate(["a", "b"]))
    assert names(trainer) == ["v1", "v1", "v2", "v2"]
    assert "test_rollout_func.py" in caplog.text, "who called the engine: here the stub itself"
    assert "without a lora_request: it gets the adapter being trained" in caplog.text


@pytest.mark.parametrize("place", ["keyword", "positional", "left out"])
def test_one_level_below_llm_too(place: str) -> None:
    trainer = trained()
    add = trainer.llm.llm_engine.add_request
    calls = {
        "keyword": lambda: add("x", "a", None, lora_request=None),
        "positional": lambda: add("x", "a", None, None, None),
        "left out": lambda: add("x", "a"),
    }
    trainer.llm.add_request = None
    trainer.train(calls[place])
    assert names(trainer) == ["v1"]


class EngineCoreRequest(SimpleNamespace):
    """What vLLM makes of a prompt: it has the LoRA request in it, and `add_request` looks at no other then."""

    lora_request: Any = None


@pytest.mark.parametrize("place", ["positional", "by name"])
def test_a_prompt_that_was_processed_before_carries_the_adapter_itself(place: str) -> None:
    trainer = trained()
    processed, kept = EngineCoreRequest(), EngineCoreRequest(lora_request=SimpleNamespace(lora_name="saved"))

    def adds() -> None:
        for prompt in (processed, kept):
            if place == "positional":
                trainer.llm.llm_engine.add_request("x", prompt)
            else:
                trainer.llm.llm_engine.add_request(request_id="x", prompt=prompt)

    trainer.train(adds)
    assert processed.lora_request.lora_name == "v1"
    assert kept.lora_request.lora_name == "saved"
    assert names(trainer) == ["v1", None], "one that names its adapter is left as it is"


def test_a_method_of_a_users_subclass_called_from_anywhere() -> None:
    trainer = trained(Subclass)
    trainer.own_rollout()
    assert names(trainer) == ["v1", "v1"]


def test_threads_that_a_trainer_waits_for() -> None:
    trainer = trained()

    def in_a_thread() -> None:
        thread = threading.Thread(target=trainer.llm.generate, args=(["a"],))
        thread.start()
        thread.join()

    trainer.train(in_a_thread)
    in_a_thread()
    assert names(trainer) == ["v1", None], "outside of a trainer the engine is vLLM's own"


def test_the_base_model_on_purpose() -> None:
    trainer = trained()
    base = trainer.model.get_base_model()
    trainer.train(lambda: base.fast_generate(["a"], lora_request=None))
    with trainer.model.disable_adapter():
        trainer.train(lambda: trainer.llm.generate(["a"]))
    assert names(trainer) == [None, None]


def test_one_threads_base_model_is_not_anothers() -> None:
    trainer = trained()
    inside, through = threading.Event(), threading.Event()

    def judge() -> None:
        with state_of(trainer.llm).as_asked():
            inside.set()
            through.wait(300)

    thread = threading.Thread(target=judge)
    thread.start()
    inside.wait(300)
    trainer.train(lambda: trainer.llm.generate(["a"]))
    through.set()
    thread.join()
    assert names(trainer) == ["v1"]


def test_each_of_two_trainers_on_one_engine_gets_its_own() -> None:
    engine = Engine()
    first = trained(Subclass, engine)
    randomize(first.model, seed=1)
    second = trained(Subclass, engine)
    for trainer in (first, second, first):
        trainer.own_rollout()
    sync: Any = state_of(engine).adapter_sync
    sent = [
        max(float(tensor.abs().max()) for name, tensor in adapter.tensors.items() if "lora_B" in name)
        for adapter in sync.published
    ]
    assert [value > 0 for value in sent] == [False, True, False, True]


def test_another_engine_is_left_alone() -> None:
    trainer, judge = trained(), trained()
    trainer.train(lambda: judge.llm.generate(["a"]))
    assert names(judge) == [None]


def test_what_cannot_be_supplied_stops_before_anything_is_sampled() -> None:
    trainer = trained()
    state = state_of(trainer.llm)
    state.weights_lost = True
    del Trainer.sync_weights
    try:
        with pytest.raises(StaleAdapter, match="would not use the current policy") as caught:
            trainer.train(lambda: trainer.llm.generate(["a"]))
    finally:
        Trainer.sync_weights = lambda self: hooks.hand_over(self)  # type: ignore[method-assign, assignment]
    assert names(trainer) == []
    assert any("without a lora_request while Trainer runs, at " in note for note in caught.value.__notes__)


def test_a_version_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trlpatch.engine.guards.LIVE_NAME", "v")
    trainer = trained()
    kept = trainer.model.load_lora()
    trainer.llm.generate(["a"], lora_request=kept)
    randomize(trainer.model)
    trainer.model.load_lora()
    with pytest.raises(StaleAdapter, match="'v1', a version of the live adapter that the engine does not hold"):
        trainer.llm.generate(["a"], lora_request=kept)
    trainer.llm.generate(["a"], lora_request=SimpleNamespace(lora_name="saved"))
    assert names(trainer) == ["v1", "saved"]


def test_the_good_path_walks_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained()
    monkeypatch.setattr(bare_requests, "_trainer_among", lambda *_: sys.exit("walked"))
    trainer.train(lambda: trainer.llm.generate(["a"], lora_request=hooks.lora_request(trainer, trainer.llm)))
    state_of(trainer.llm).policy_pushed()
    trainer.train(lambda: trainer.llm.generate(["a"]))
    assert names(trainer) == ["v1", None]


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trlpatch")
