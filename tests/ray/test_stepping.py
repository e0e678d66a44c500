"""The stepping thread: requests beside each other, commands between two steps, nothing left waiting when it ends."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from tests.ray.fakes import FakeLLM, FakeParams
from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.capture import additions
from trlpatch.ray.messages import Version
from trlpatch.ray.stepping import Answers, Stepper

LONG = 60.0  # seconds; nothing here takes one


def ask(stepper: Stepper, *prompts: str, tokens: int = 2, key: str = "") -> Future[Answers]:
    params = [FakeParams(tokens)] * len(prompts)
    return stepper.generate(lambda llm: additions(llm, "generate", list(prompts), params, {}), len(prompts), key)


@pytest.fixture
def gate() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def llm(gate: threading.Semaphore) -> FakeLLM:
    return FakeLLM(gate=gate)


@pytest.fixture
def stepper(llm: FakeLLM, gate: threading.Semaphore) -> Any:
    made = Stepper(lambda: llm, index=3)
    made.built.result(LONG)
    yield made
    gate.release(1000)
    made.stop(LONG)


def test_groups_run_beside_each_other_and_are_answered_in_order(
    stepper: Stepper, llm: FakeLLM, gate: threading.Semaphore
) -> None:
    one = ask(stepper, "a", "b", tokens=3)
    assert llm.llm_engine.stepping.wait(LONG)
    two = ask(stepper, "c", tokens=1)
    gate.release()  # the step that runs, of the first group alone
    gate.release()  # one with both
    assert [output.prompt for output in two.result(LONG).outputs] == ["c"]
    assert not one.done()
    gate.release()
    answers = one.result(LONG)
    assert [output.prompt for output in answers.outputs] == ["a", "b"]
    assert answers.tokens == 6
    assert llm.llm_engine.steps == 3


def test_a_command_runs_between_two_steps_and_requests_go_on_with_what_it_has_changed(
    stepper: Stepper, llm: FakeLLM, gate: threading.Semaphore
) -> None:
    asked = ask(stepper, "a", tokens=3)
    assert llm.llm_engine.stepping.wait(LONG)  # the first step runs

    def update(engine: FakeLLM) -> str:
        engine.llm_engine.holds = "new"
        stepper.version = Version(1)
        return threading.current_thread().name

    done = stepper._command(update)
    assert not done.done()
    gate.release(3)
    answers = asked.result(LONG)
    assert done.result(LONG) == "engine-3"
    (output,) = answers.outputs
    assert output.outputs[0].token_ids == ["base", "new", "new"]
    assert (answers.first_version, answers.last_version) == (Version(), Version(1))


def test_a_paused_engine_keeps_its_requests(stepper: Stepper, llm: FakeLLM, gate: threading.Semaphore) -> None:
    stepper.pause()
    asked = ask(stepper, "a")
    assert stepper.between_steps(lambda engine: list(engine.llm_engine.running), timeout=LONG) == ["0"]
    assert stepper.health().state == "paused"
    assert stepper.health().running == 1
    gate.release(2)
    assert llm.llm_engine.steps == 0
    stepper.resume()
    assert asked.result(LONG).tokens == 2


def test_groups_are_aborted_by_key(stepper: Stepper, llm: FakeLLM, gate: threading.Semaphore) -> None:
    stepper.pause()
    mine, others = ask(stepper, "a", "b", key="mine"), ask(stepper, "c", key="others")
    assert stepper.abort("mine") == 2
    with pytest.raises(CancelledError):
        mine.result(LONG)
    assert llm.llm_engine.aborted == ["0", "1"]
    gate.release(2)
    stepper.resume()
    assert others.result(LONG).tokens == 2


def test_what_arrives_of_a_group_after_it_was_aborted_is_not_begun(stepper: Stepper, llm: FakeLLM) -> None:
    assert stepper.abort("mine") == 0
    with pytest.raises(CancelledError):
        ask(stepper, "a", key="mine").result(LONG)
    assert not llm.llm_engine.running


def test_what_is_wrong_with_one_prompt_ends_its_group_and_no_other(
    stepper: Stepper, llm: FakeLLM, gate: threading.Semaphore
) -> None:
    stepper.pause()
    good = ask(stepper, "a")
    stepper.between_steps(lambda _: None, timeout=LONG)
    original, llm.llm_engine.add_request = llm.llm_engine.add_request, refusing_second()  # type: ignore[method-assign]
    bad = ask(stepper, "b", "c")
    with pytest.raises(ValueError, match="no place"):
        bad.result(LONG)
    llm.llm_engine.add_request = original  # type: ignore[method-assign]
    gate.release(2)
    stepper.resume()
    assert good.result(LONG).tokens == 2
    assert stepper.health().running == 0


def refusing_second() -> Any:
    count = iter(range(10))

    def add_request(request_id: str, *_: Any, **__: Any) -> str:
        if next(count):
            raise ValueError("no place")
        return request_id

    return add_request


def test_a_command_that_fails_says_so_to_its_caller_alone(stepper: Stepper) -> None:
    def fails(_: Any) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        stepper.between_steps(fails, timeout=LONG)
    assert stepper.between_steps(lambda _: 1, timeout=LONG) == 1


def test_an_engine_whose_step_fails_is_lost_with_all_that_waits(gate: threading.Semaphore) -> None:
    llm = FakeLLM(gate=gate, fail_at=1)
    stepper = Stepper(lambda: llm, index=1)
    asked = ask(stepper, "a")
    gate.release()
    with pytest.raises(EngineLost, match="engine 1 answers no request any more: CUDA error") as caught:
        asked.result(LONG)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(EngineLost):
        ask(stepper, "b")
    with pytest.raises(EngineLost):
        stepper.between_steps(lambda _: 1)
    health = stepper.health()
    assert (health.state, health.running) == ("lost", 0)
    assert "illegal memory access" in health.reason


def test_an_engine_that_hangs_can_be_declared_lost(stepper: Stepper, llm: FakeLLM, gate: threading.Semaphore) -> None:
    asked = ask(stepper, "a")
    assert llm.llm_engine.stepping.wait(LONG)
    with pytest.raises(RolloutTimeout, match=r"engine 3: a command had not begun after 0\.01 s"):
        stepper.between_steps(lambda _: 1, timeout=0.01)
    stepper.lose("it ended no step for 600 s")
    with pytest.raises(EngineLost, match="600 s"):
        asked.result(LONG)


def test_an_engine_that_does_not_come_up_says_why() -> None:
    def build() -> Any:
        raise RuntimeError("no such model")

    stepper = Stepper(build)
    with pytest.raises(RuntimeError, match="no such model"):
        stepper.built.result(LONG)
    with pytest.raises(EngineLost, match="no such model"):
        ask(stepper, "a")


def test_stopping_ends_the_thread_and_what_waits(llm: FakeLLM) -> None:
    stepper = Stepper(lambda: llm)
    stepper.pause()
    asked = ask(stepper, "a")
    stepper.stop(LONG)
    assert not stepper._thread.is_alive()
    with pytest.raises(EngineLost, match="shut down"):
        asked.result(LONG)
    assert stepper.health().state == "stopped"


def test_no_prompts_are_answered_at_once(stepper: Stepper) -> None:
    assert ask(stepper).result(LONG).outputs == []
