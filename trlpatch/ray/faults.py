"""Faults of rollout engines on Ray actors: which errors mean that an engine is lost, and how errors travel.

Ray 2.60 has several words for one thing: a process that dies while it works is ActorDiedError, with restarts
ActorUnavailableError, and its node's death is told in the text; an exception that cannot be pickled arrives as
UnserializableException, as RaySystemError or as a RayTaskError whose cause is a RayError; a KeyboardInterrupt inside
of an actor is TaskCancelledError. Classes are told apart by their names: nothing here imports Ray, torch or vLLM.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

from trlpatch.errors import EngineRaised

P = ParamSpec("P")
T = TypeVar("T")

Kind = Literal["killed", "unreachable", "node lost", "out of memory", "hung", "failed", "stale", "aborted", "request"]

WORDS: dict[Kind, str] = {
    "killed": "died",
    "unreachable": "cannot be reached",
    "node lost": "was lost with its node",
    "out of memory": "ran out of memory",
    "hung": "hung",
    "failed": "failed",
    "stale": "had other weights than were asked for",
    "aborted": "was told to drop the request",
    "request": "refused the request",
}
"""What each kind of fault is in a sentence that begins with the engine."""

KINDS: dict[str, Kind] = {
    # What a node's death looks like for its first half minute. "The task may or may not have been executed."
    "ActorUnavailableError": "unreachable",
    "RayActorError": "killed",  # ActorDiedError
    "WorkerCrashedError": "killed",
    "ActorUnschedulableError": "node lost",
    "ActorPlacementGroupRemoved": "node lost",
    "LocalRayletDiedError": "node lost",
    "NodeDiedError": "node lost",
    "ObjectLostError": "node lost",  # with its owner, or with the node that held the answer
    # torch's (device memory) and Ray's memory monitor's (host memory): what the engine holds after it is not known.
    "OutOfMemoryError": "out of memory",
    "MemoryError": "out of memory",
    "AcceleratorError": "failed",  # torch 2.8 and newer: every later call of the CUDA context fails, too
    "EngineHung": "hung",
    "RolloutTimeout": "hung",
    "EngineLost": "failed",
    "EngineDeadError": "failed",  # vLLM's: an engine core or a worker in another process ended
    "RaySystemError": "failed",
    "TaskCancelledError": "failed",
    "WrongVersion": "stale",
    "CancelledError": "aborted",  # `abort` of the actor, for this request or for others in the same engine
}
"""Classes of errors that are not the request's own, and what happened to the engine."""

_DEVICE_ERROR = re.compile(r"\b(CUDA|HIP|NCCL) (error|out of memory)", re.IGNORECASE)
_MEMORY = re.compile(r"out ?of ?memory|low on memory|memory usage threshold|\bMemoryError\b", re.IGNORECASE)
_NODE = re.compile(r"\bits node\b|\bnode\b.{0,40}\b(died|dead|terminated|lost|preempted)\b", re.IGNORECASE)
_DETAIL = re.compile(r"Worker exit detail: ([^\n]+)")
_DEAD = re.compile(r"(?:is dead|died) because ([^\n]+)")
_ADVICE = re.compile(r" Some common causes include.*", re.DOTALL)
"""Of Ray, behind every death whose cause it does not know: speaks of memory and nodes, whatever happened."""


@dataclass(frozen=True)
class Fault:
    """Why a call of an engine gave no answer."""

    engine: int
    kind: Kind
    error: BaseException
    """As it was raised in the engine's process where it could travel, else what Ray said of it."""

    @property
    def lost(self) -> bool:
        """Must the engine be replaced? An error of the request's own leaves the engine as it was."""
        return self.kind not in ("aborted", "request")

    def __str__(self) -> str:
        return f"engine {self.engine} {WORDS[self.kind]} ({summary(self.error)})"


def fault_of(engine: int, error: BaseException) -> Fault:
    """Say what an error that `ray.get` raised means for the engine that the call went to."""
    cause = unwrapped(error)
    text = _ADVICE.sub("", str(cause))
    for one in type(cause).__mro__:
        kind = KINDS.get(one.__name__)
        if kind == "killed":
            kind = "node lost" if _NODE.search(text) else "out of memory" if _MEMORY.search(text) else kind
        elif one.__name__ == "EngineLost" and _MEMORY.search(text):
            kind = "out of memory"
        if kind is not None:
            return Fault(engine, kind, cause)
    if isinstance(cause, RuntimeError) and _DEVICE_ERROR.search(text):
        return Fault(engine, "out of memory" if _MEMORY.search(text) else "failed", cause)
    return Fault(engine, "request", cause)


def unwrapped(error: BaseException) -> BaseException:
    """Return the error that was raised in the actor, with Ray's text (the actor's traceback) as a note.

    `ray.get` raises a RayTaskError that is a subclass of the error's class as well; what was raised is its `cause`.
    """
    if type(error).__name__ == "UnserializableException":
        return EngineRaised(f"an exception that cannot be pickled; Ray has its text:\n{error}")
    cause = getattr(error, "cause", None)
    if not isinstance(cause, BaseException) or not is_a(error, "RayTaskError"):
        return error
    if type(cause).__name__ == "RayError":
        return EngineRaised(f"an exception that cannot be pickled; Ray has its text:\n{cause}")
    if not getattr(cause, "__notes__", None):
        cause.add_note(f"in the engine's process:\n{error}")
    return cause


def errors_travel(method: Callable[P, T]) -> Callable[P, T]:
    """Have an actor's method raise EngineRaised, with the text, in place of an exception that cannot be pickled.

    An exception whose `__init__` wants other arguments than its `args` is pickled without complaint and cannot be
    unpickled: with Ray 2.60 the caller gets an UnserializableException, of no use to `except`.
    """

    @functools.wraps(method)
    def carried(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if travels(error):
                raise
            text = "".join(traceback.format_exception(error))
            raise EngineRaised(f"{type(error).__qualname__}, which cannot be pickled: {error}\n{text}") from None

    return carried


def all_errors_travel(actor: type[T]) -> type[T]:
    """Have every public method of an actor's class do so, also those that it inherits."""
    for name in dir(actor):
        method = getattr(actor, name)
        if not name.startswith("_") and inspect.isfunction(method):
            setattr(actor, name, errors_travel(method))
    return actor


def travels(error: BaseException) -> bool:
    """Tell whether an exception arrives as what it is in another process."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def summary(error: BaseException) -> str:
    """Return class and message of an error on one line; of what Ray says about a death, the sentence that says why."""
    text = _ADVICE.sub("", str(error).strip())
    why = _DETAIL.search(text) or _DEAD.search(text)
    line = why.group(1) if why else text.partition("\n")[0]
    return f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__


def is_a(error: BaseException, name: str) -> bool:
    """Tell whether an error is of a class of that name, or of one that inherits from it."""
    return any(one.__name__ == name for one in type(error).__mro__)
