"""Which errors cost an engine, and what arrives of them. Ray's classes are stood in for by name."""

from __future__ import annotations

import inspect
import math
import pickle
import threading
from typing import Any

import pytest

from trlpatch import errors
from trlpatch.errors import EngineRaised, InvalidOption, RolloutFailed, TrlpatchError
from trlpatch.ray.actor import LLMRayActor
from trlpatch.ray.faults import Fault, all_errors_travel, errors_travel, fault_of, summary, travels
from trlpatch.ray.timeouts import DEFAULTS, VARIABLES, Timeouts


def rays(name: str, *bases: str, text: str = "", cause: BaseException | None = None) -> Exception:
    """An exception of a class of this name; what Ray 2.60 raises, as far as it is looked at."""
    made: type[Exception] = Exception
    for one in reversed(bases):
        made = type(one, (made,), {})
    error = type(name, (made,), {})(text)
    if cause is not None:
        error.cause = cause  # type: ignore[attr-defined]
    return error


def task_error(cause: BaseException) -> Exception:
    return rays(f"RayTaskError({type(cause).__name__})", "RayTaskError", text="the actor's traceback", cause=cause)


DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: LLMRayActor
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by the OOM killer due to high memory usage"""
KILLED = (
    "The actor died unexpectedly before finishing this task.\nThe actor is dead because it was killed by `ray.kill`."
)
NODE = (
    "The actor died unexpectedly before finishing this task.\n\tip: 10.0.0.2\n"
    "The actor died because its node has died. Node Id: c4ce\n\tthe actor's node was terminated unexpectedly"
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (rays("ActorDiedError", "RayActorError", text=DIED), "killed"),
        (rays("ActorDiedError", "RayActorError", text=KILLED), "killed"),
        (rays("ActorDiedError", "RayActorError", text=NODE), "node lost"),
        (rays("ActorUnavailableError", "RayActorError", text="RPC error: Socket closed"), "unreachable"),
        (rays("OutOfMemoryError", text="Task was killed due to the node running low on memory."), "out of memory"),
        (rays("ObjectReconstructionFailedError", "ObjectLostError", text="lost"), "node lost"),
        (task_error(rays("OutOfMemoryError", "RuntimeError", text="CUDA out of memory. Tried to")), "out of memory"),
        (task_error(MemoryError()), "out of memory"),
        (task_error(RuntimeError("CUDA error: an illegal memory access was encountered")), "failed"),
        (task_error(RuntimeError("CUDA out of memory")), "out of memory"),
        (task_error(errors.EngineLost("half-written")), "failed"),
        (task_error(errors.EngineLost("answers no request any more: OutOfMemoryError: CUDA out")), "out of memory"),
        (task_error(errors.EngineLost("answers no request any more: MemoryError: chaos")), "out of memory"),
        (task_error(errors.RolloutTimeout("a command did not end")), "hung"),
        (task_error(errors.WrongVersion("holds 3")), "stale"),
        (task_error(rays("EngineDeadError")), "failed"),
        (rays("RayTaskError(TaskCancelledError)", "RayTaskError", cause=rays("TaskCancelledError")), "failed"),
        (task_error(ValueError("prompt is too long")), "request"),
        (task_error(RuntimeError("no such LoRA")), "request"),
        (rays("UnserializableException", text="Failed to deserialize"), "request"),
        (rays("RaySystemError", text="System error: No module named 'x'"), "failed"),
    ],
)
def test_what_an_error_means_for_the_engine(error: Exception, kind: str) -> None:
    fault = fault_of(3, error)
    assert fault.kind == kind
    assert fault.lost == (kind != "request")
    assert str(fault).startswith("engine 3 ")


def test_the_users_error_arrives_as_itself_with_the_actors_traceback() -> None:
    fault = fault_of(0, task_error(ValueError("prompt is too long")))
    assert type(fault.error) is ValueError
    assert fault.error.__notes__ == ["in the engine's process:\nthe actor's traceback"]
    assert fault_of(0, task_error(fault.error)).error.__notes__ == fault.error.__notes__, "once"


def test_what_cannot_be_pickled_arrives_as_text() -> None:
    no_type = rays("RayError", text="Exception vllm.Odd isn't serializable: cannot pickle '_thread.lock' object")
    fault = fault_of(0, rays("RayTaskError", cause=no_type))
    assert isinstance(fault.error, EngineRaised)
    assert "vllm.Odd" in str(fault.error)
    assert isinstance(fault_of(0, rays("UnserializableException", text="Odd")).error, EngineRaised)


class OddSignature(Exception):
    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code}: {text}")


class WithLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def test_an_actors_method_raises_what_arrives() -> None:
    class Local(Exception):
        pass

    @errors_travel
    def method(error: Exception | None) -> str:
        if error is not None:
            raise error
        return "fine"

    assert method(None) == "fine"
    with pytest.raises(ValueError, match="as it is"):
        method(ValueError("as it is"))
    for odd in (OddSignature(3, text="odd"), WithLock("odd"), Local("odd")):
        with pytest.raises(EngineRaised, match=rf"{type(odd).__name__}, which cannot be pickled: .*odd") as raised:
            method(odd)
        assert "raise error" in str(raised.value), "its traceback is in the text"
        assert travels(raised.value)


def test_a_class_has_it_for_all_public_methods_and_the_inherited_ones() -> None:
    class Mixin:
        def inherited(self, *, code: int = 3) -> None:
            raise OddSignature(code, text="odd")

    @all_errors_travel
    class Odd(Mixin):
        def own(self) -> None:
            self._private()

        def _private(self) -> None:
            raise OddSignature(4, text="odd")

    with pytest.raises(EngineRaised):
        Odd().inherited()
    with pytest.raises(EngineRaised):
        Odd().own()
    with pytest.raises(OddSignature):
        Odd()._private()
    with pytest.raises(OddSignature):
        Mixin().inherited()
    assert str(inspect.signature(Odd.inherited)) == "(self, *, code: 'int' = 3) -> 'None'"
    assert inspect.unwrap(LLMRayActor.generate) is not LLMRayActor.generate


ARGUMENTS: dict[type, tuple[Any, ...]] = {
    RolloutFailed: ("text", ValueError("a"), KeyError("b")),
    errors.InvalidSetting: ("length", -1, "1 or more"),
    errors.CalibrationError: ("calibration.json", "has no key `gpu`"),
}
"""Of errors that take more than a text."""


def test_every_error_of_ours_arrives_as_what_it_is() -> None:
    for one in vars(errors).values():
        if not (inspect.isclass(one) and issubclass(one, TrlpatchError)):
            continue
        error = one(*ARGUMENTS.get(one, ("text",)))
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is one
        assert str(again) == str(error)
    assert isinstance(pickle.loads(pickle.dumps(RolloutFailed("", ValueError(), KeyError("b")))).second, KeyError)


def test_a_line_says_why_an_actor_is_dead() -> None:
    line = summary(rays("ActorDiedError", text=DIED))
    assert line == "ActorDiedError: Worker unexpectedly exits with a connection error code 2. End of file."
    assert summary(rays("ActorDiedError", text=NODE)) == "ActorDiedError: its node has died. Node Id: c4ce"
    assert summary(ValueError("first\nsecond")) == "ValueError: first"
    assert summary(MemoryError()) == "MemoryError"


def test_timeouts_are_arguments_then_variables_then_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    assert {name: Timeouts()[name] for name in DEFAULTS} == DEFAULTS
    assert (DEFAULTS["init"], DEFAULTS["health"], DEFAULTS["sync"]) == (1200, 600, 120)
    monkeypatch.setenv("TRLPATCH_RAY_INIT_TIMEOUT", "30")
    monkeypatch.setenv("TRLPATCH_RAY_SYNC_TIMEOUT", "inf")
    assert (Timeouts().init, Timeouts(init=5).init, Timeouts().sync) == (30, 5, math.inf)
    assert Timeouts(init=5).how_to_raise("init") == (
        "Raise it with timeouts=Timeouts(init=10) or TRLPATCH_RAY_INIT_TIMEOUT=10"
    )


@pytest.mark.parametrize("value", [0, -1, math.nan, None, "600", True])
def test_a_timeout_is_a_positive_number(value: Any) -> None:
    with pytest.raises(InvalidOption, match=r"Timeouts\(health=.*expected a positive number .* answer"):
        Timeouts(health=value)


def test_a_fault_says_engine_kind_and_cause() -> None:
    assert str(Fault(1, "hung", errors.EngineHung("no step"))) == "engine 1 hung (EngineHung: no step)"
