"""What is found of an engine that failed while it was built, and what is left of it. Needs neither torch nor vLLM."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from trlpatch.engine import build


class Memory:
    """Something large that an executor holds."""


class Executor:
    def __init__(self, events: list[str], *, fails: bool) -> None:
        self.driver_worker = Memory()
        self.events = events
        if fails:
            raise RuntimeError("no memory")

    def shutdown(self) -> None:
        self.events.append("executor")


class Core:
    def __init__(self, events: list[str], *, executor_fails: bool = False, later: BaseException | None = None) -> None:
        self.events = events
        self.model_executor = Executor(events, fails=executor_fails)
        if later is not None:
            raise later
        self.scheduler = SimpleNamespace(shutdown=lambda: events.append("scheduler"))

    def shutdown(self) -> None:
        raise AssertionError("destroys process groups of others")


class Client:
    def __init__(self, **changes: Any) -> None:
        self.engine_core = Core(**changes)


class Engine:
    """A `vllm.LLM` in miniature: LLM, LLMEngine, InprocClient, EngineCore, executor."""

    def __init__(self, **changes: Any) -> None:
        self.llm_engine = SimpleNamespace(engine_core=Client(**changes))


def built_and_failed(**changes: Any) -> BaseException:
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        Engine(**changes)
    return raised.value


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"executor_fails": True}, [Executor]),
        ({"later": RuntimeError("x")}, [Core]),
        ({"later": KeyboardInterrupt()}, [Core]),
    ],
)
def test_unfinished_parts_are_found_and_shut_down(changes: dict[str, Any], parts: list[type]) -> None:
    events: list[str] = []
    error = built_and_failed(events=events, **changes)
    found = build._unfinished(error)
    assert [type(part) for part in found] == parts
    for part in found:
        build._take_down(part)
    assert events == ["executor"]


def test_unfinished_parts_are_found_behind_another_exception() -> None:
    events: list[str] = []
    error = RuntimeError("Engine core initialization failed")
    error.__cause__ = built_and_failed(events=events, later=ValueError("x"))
    assert [type(part) for part in build._unfinished(error)] == [Core]


def test_a_whole_engine_is_shut_down_part_by_part() -> None:
    events: list[str] = []
    build._take_down(Engine(events=events))
    assert events == ["executor", "scheduler"]


class CollectedClient(Client):
    """`InprocClient` from vLLM 0.31 on."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self._finalizer = weakref.finalize(self, self.engine_core.shutdown)
        self._finalizer.atexit = False


class CollectedEngine:
    """A `vllm.LLM` whose client and engine have finalizers."""

    def __init__(self, events: list[str]) -> None:
        self.llm_engine = SimpleNamespace(engine_core=CollectedClient(events=events))
        self.llm_engine.compiled = compiled = Memory()
        self.llm_engine._finalizer = weakref.finalize(compiled, events.append, "compiled")


def test_an_engine_that_is_collected_leaves_the_process_groups_to_others() -> None:
    events: list[str] = []
    engine = CollectedEngine(events)
    build.leave_groups(engine)
    build.leave_groups(engine)
    assert events == []
    del engine
    gc.collect()
    assert sorted(events) == ["compiled", "executor", "scheduler"]  # and not Core.shutdown


@pytest.mark.parametrize("prepared", [False, True])
def test_an_engine_that_was_shut_down_is_not_shut_down_again_when_it_is_collected(*, prepared: bool) -> None:
    events: list[str] = []
    engine = CollectedEngine(events)
    if prepared:
        build.leave_groups(engine)
    build._take_down(engine)
    assert events == ["executor", "scheduler"]
    del engine
    gc.collect()
    assert events == ["executor", "scheduler", "compiled"]


def test_engines_without_such_a_finalizer_are_let_be() -> None:
    for other in (Engine(events=[]), SimpleNamespace(), SimpleNamespace(llm_engine=None)):
        build.leave_groups(other)
    assert not hasattr(Engine(events=[]).llm_engine.engine_core, "_finalizer")


def test_model_parallel_groups_are_left_to_other_engines() -> None:
    events: list[str] = []

    class UniProcExecutor(Executor):
        pass

    class ExecutorWithExternalLauncher(UniProcExecutor):
        def shutdown(self) -> None:
            super().shutdown()
            events.append("model parallel groups")

    class Ours(ExecutorWithExternalLauncher):
        pass

    for kind in (UniProcExecutor, ExecutorWithExternalLauncher, Ours):
        build._take_down(SimpleNamespace(model_executor=kind(events, fails=False)))
    assert events == ["executor"] * 3


def test_an_engine_in_another_process_is_shut_down_through_its_client() -> None:
    events: list[str] = []
    client = SimpleNamespace(shutdown=lambda: events.append("client"))
    build._take_down(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client, model_executor=None)))
    assert events == ["client"]


def test_what_cannot_be_shut_down_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    executor = SimpleNamespace(driver_worker=None, shutdown=lambda: 1 / 0)
    scheduler = SimpleNamespace(shutdown=lambda: None)
    with caplog.at_level("DEBUG", logger="trlpatch"):
        build._take_down(SimpleNamespace(model_executor=executor, scheduler=scheduler))
    assert "ZeroDivisionError" in caplog.text


def test_frames_let_go_of_what_they_held_although_they_were_looked_at() -> None:
    error = built_and_failed(events=[], later=RuntimeError("x"))
    memory = weakref.ref(build._unfinished(error)[0].model_executor.driver_worker)
    assert memory() is not None
    build.forget_frames(error)
    gc.collect()
    assert memory() is None
    assert error.__traceback__ is not None, "where it happened can still be read"


def test_an_engine_that_was_let_go_of_is_freed_although_vllm_has_frozen_it() -> None:
    class Engine: ...

    gone: Any = Engine()
    gone.itself = gone
    memory = weakref.ref(gone)
    gc.freeze()
    del gone
    gc.collect()
    assert memory() is not None
    build.let_go_of_engines()
    assert memory() is None


def test_the_environment_is_put_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRLPATCH_TEST_KEPT", "before")
    monkeypatch.setenv("TRLPATCH_TEST_GONE", "before")

    def change(fail: bool = False) -> None:
        os.environ["TRLPATCH_TEST_KEPT"] = "after"
        os.environ["TRLPATCH_TEST_NEW"] = "after"
        del os.environ["TRLPATCH_TEST_GONE"]
        if fail:
            raise KeyboardInterrupt

    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt), build.environment_kept_on_failure():
        change(fail=True)
    assert dict(os.environ) == before
    with build.environment_kept_on_failure():
        change()
    assert os.environ["TRLPATCH_TEST_KEPT"] == "after"
    del os.environ["TRLPATCH_TEST_NEW"]


@pytest.mark.parametrize(("given", "inside"), [(None, "0"), ("1", "1")])
def test_multiprocessing_is_off_while_building_unless_the_user_set_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, inside: str
) -> None:
    monkeypatch.setenv(build.MULTIPROCESSING, given or "")
    if given is None:
        monkeypatch.delenv(build.MULTIPROCESSING)
    with build._set_unless_given(build.MULTIPROCESSING, "0"):
        assert os.environ[build.MULTIPROCESSING] == inside
    assert os.environ.get(build.MULTIPROCESSING) == given


class State:
    """vllm.distributed.parallel_state, writing down what is destroyed."""

    def __init__(self, world: Any) -> None:
        self._WORLD = world
        self.destroyed: list[str] = []

    def destroy_model_parallel(self) -> None:
        self.destroyed.append("model parallel")

    def destroy_distributed_environment(self) -> None:
        self.destroyed.append("everything")


@pytest.mark.parametrize(
    ("groups", "destroyed"),
    [
        (build.ProcessGroups(default=False, engine=False), ["model parallel", "everything"]),
        (build.ProcessGroups(default=True, engine=False), ["model parallel", "vLLM's world"]),
        (build.ProcessGroups(default=True, engine=True), []),
    ],
)
def test_only_process_groups_of_the_failed_engine_are_destroyed(
    monkeypatch: pytest.MonkeyPatch, groups: build.ProcessGroups, destroyed: list[str]
) -> None:
    state = State(None)
    state._WORLD = SimpleNamespace(destroy=lambda: state.destroyed.append("vLLM's world"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)  # type: ignore[arg-type]
    groups.restore()
    assert state.destroyed == destroyed


def test_sleep_pools_of_an_older_vllm_are_released_once_their_engine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Memory()
    alive, wrapper = weakref.ref(pool), object()
    allocator = SimpleNamespace(allocator_and_pools={"weights": (pool, wrapper)})
    del pool
    monkeypatch.setattr(build.cumem, "allocator", lambda: allocator)
    build.free_memory(build.ProcessGroups(default=True, engine=True))
    assert alive() is not None, "another engine may use it"
    build.free_memory(build.ProcessGroups(default=False, engine=False))
    assert alive() is None
    assert wrapper in build._allocators
    build._allocators.remove(wrapper)
