"""Requests of two threads, and requests left behind, on an engine core that is a few lines long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import trlpatch
from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub
from tests.fakes.models import lora_model, randomize
from trlpatch import hooks
from trlpatch.engine.attach import attach_engine
from trlpatch.engine.sleep import put_to_sleep
from trlpatch.engine.state import state_of
from trlpatch.errors import EngineBusy

pytestmark = pytest.mark.torch


class Core:
    """`LLMEngine`, as `LLM.generate` uses it; each step finishes one request."""

    def __init__(self, inner: Any) -> None:
        vars(self).update(vars(inner))
        self.output_processor = SimpleNamespace(request_states={}, parent_requests={})
        self.before_step: Callable[[], Any] = lambda: None
        self.aborted: list[str] = []

    def add_request(
        self, name: str, prompt: str, params: Any = None, arrival: Any = None, lora_request: Any = None
    ) -> None:
        self.output_processor.request_states[name] = (prompt, lora_request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.output_processor.request_states)

    def step(self) -> list[Any]:
        self.before_step()
        name, *_ = self.output_processor.request_states
        return [self.output_processor.request_states.pop(name)]

    def abort_request(self, names: list[str], internal: bool = False) -> None:
        assert internal
        for name in names:
            self.aborted.append(self.output_processor.request_states.pop(name)[0])


class Engine(RecordingEngineStub):
    """`LLM` above it."""

    def __init__(self) -> None:
        super().__init__(sleep=True)
        self.llm_engine: Any = Core(self.llm_engine)
        self.count = 0

    def generate(self, prompts: Any = None, *, lora_request: Any = None, **_: Any) -> list[Any]:
        for prompt in prompts:
            self.count += 1
            self.llm_engine.add_request(str(self.count), prompt, lora_request=lora_request)
        answers = []
        while self.llm_engine.has_unfinished_requests():
            answers += self.llm_engine.step()
        return [prompt for prompt, _ in answers]


class Owner:
    def __init__(self, model: Any, engine: Any) -> None:
        self.model, self.llm, self.vllm_mode = model, engine, "colocate"


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    state_of(made).adapter_sync = RecordingAdapterSync()
    return made


@pytest.fixture
def model(engine: Engine) -> Any:
    made = attach_engine(lora_model(), engine)
    made.load_lora()
    return made


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_call_leaves_nothing_behind(engine: Any, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine.llm_engine.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["old", "older"])
    assert engine.llm_engine.aborted == ["old", "older"]
    assert "2 unfinished requests of a call that ended in KeyboardInterrupt() were aborted" in caplog.text
    engine.llm_engine.before_step = lambda: None
    assert engine.generate(["new"]) == ["new"]


@pytest.mark.parametrize("way", ["fast_generate", "rollout", "sync"])
def test_what_was_left_by_hand_is_aborted_before_a_rollout(
    way: str, engine: Any, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(model, engine)
    engine.llm_engine.add_request("x", "old")
    engine.llm_engine.add_request("y", "older")
    ways = {
        "fast_generate": lambda: model.fast_generate(["new"]),
        "rollout": lambda: engine.generate(["new"], lora_request=hooks.lora_request(owner, engine)),
        "sync": lambda: hooks.hand_over(owner) and engine.generate(["new"]),
    }
    assert ways[way]() == ["new"]
    assert engine.llm_engine.aborted == ["old", "older"]
    assert "2 requests that an interrupted or failed rollout left in the engine were aborted" in caplog.text


@pytest.mark.parametrize("way", ["lora_request", "load_lora", "hand_over", "rollout", "put_to_sleep"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_nothing_changes_under_another_threads_requests(by_hand: bool, way: str, engine: Any, model: Any) -> None:
    owner = Owner(model, engine)
    inside, through = threading.Event(), threading.Event()

    def pause() -> None:
        inside.set()
        through.wait(300)

    def generate() -> None:
        if by_hand:
            engine.llm_engine.add_request("x", "theirs")
            pause()
            engine.llm_engine.step()
        else:
            engine.generate(["theirs"])

    engine.llm_engine.before_step = (lambda: None) if by_hand else pause
    thread = threading.Thread(target=generate, name="environment")
    thread.start()
    inside.wait(300)
    randomize(model)
    published = len(state_of(engine).adapter_sync.published)  # type: ignore[union-attr]
    ways = {
        "lora_request": lambda: trlpatch.lora_request(model),
        "load_lora": model.load_lora,
        "hand_over": lambda: hooks.hand_over(owner),
        "rollout": lambda: hooks.lora_request(owner, engine),
        "put_to_sleep": lambda: put_to_sleep(engine, state_of(engine), 1),
    }
    try:
        with pytest.raises(EngineBusy, match="'environment'"):
            ways[way]()
    finally:
        through.set()
        thread.join()
    assert len(state_of(engine).adapter_sync.published) == published  # type: ignore[union-attr]
    assert not engine.llm_engine.aborted
    assert not engine.unmapped


def test_another_threads_generate_is_waited_for(engine: Any, model: Any) -> None:
    inside, through = threading.Event(), threading.Event()

    def pause() -> None:
        inside.set()
        through.wait(300)

    engine.llm_engine.before_step = pause
    answers: list[list[str]] = []
    first = threading.Thread(target=lambda: answers.append(engine.generate(["a", "b"])))
    first.start()
    inside.wait(300)
    second = threading.Thread(target=lambda: answers.append(model.fast_generate(["c"])))
    second.start()
    second.join(0.2)
    through.set()
    first.join()
    second.join()
    assert answers == [["a", "b"], ["c"]]


def test_a_request_by_hand_beside_another_threads_call_gets_no_version_of_before(
    engine: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trlpatch.engine.guards.LIVE_NAME", "v")  # what the stub calls them
    owner, inner = Owner(model, engine), engine.llm_engine
    inside, through = threading.Event(), threading.Event()

    def pause() -> None:
        inside.set()
        through.wait(300)

    with state_of(engine).supplying(lambda: hooks.lora_request(owner, engine)):
        inner.add_request("x", "mine")
        inner.step()
        randomize(model)
        trlpatch.lora_request(model)
        inner.before_step = pause
        thread = threading.Thread(target=engine.generate, args=(["theirs"],), name="environment")
        thread.start()
        inside.wait(300)
        try:
            with pytest.raises(EngineBusy, match="'environment'"):
                inner.add_request("y", "mine")
        finally:
            through.set()
            thread.join()
        inner.add_request("z", "mine")
    assert [request.lora_name for _, request in inner.output_processor.request_states.values()] == ["v2"]


def test_requests_added_by_hand_one_after_the_other_keep_their_version(engine: Any, model: Any) -> None:
    for name in "xyz":
        engine.llm_engine.add_request(name, name, lora_request=trlpatch.lora_request(model))
    assert len({id(request) for _, request in engine.llm_engine.output_processor.request_states.values()}) == 1
    randomize(model)
    with pytest.raises(EngineBusy, match="the adapter has changed, and 3 requests"):
        trlpatch.lora_request(model)
    assert engine.llm_engine.aborted == ["x", "y", "z"]
    assert trlpatch.lora_request(model) is not None


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trlpatch")
