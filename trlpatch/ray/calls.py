"""Calls to actors: what Ray raises, as trlpatch's own errors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from trlpatch.errors import EngineLost, RolloutTimeout, TrlpatchError


def own_error(error: Exception, index: int, doing: str) -> Exception:
    """The exception to raise for what `ray.get` raised of an actor's call."""
    from ray import exceptions

    found: Exception = error
    if isinstance(error, exceptions.RayTaskError):
        # Ray raises a class of its own that inherits from the cause's; whose text is the traceback.
        cause: object = getattr(error, "cause", None)
        if isinstance(cause, TrlpatchError):
            return cause
        if isinstance(cause, Exception) and "ray" not in type(cause).__module__.split("."):
            cause.__cause__ = error
            return cause
        return found
    if isinstance(error, exceptions.RayActorError):  # ActorDiedError and ActorUnavailableError
        lost = EngineLost(f"{doing}: rollout engine {index} is lost, its actor has died: {first_line(error)}")
        lost.__cause__ = error
        return lost
    return error


def first_line(error: BaseException) -> str:
    """What an exception says, without the traceback that Ray puts into it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def gather(refs: Sequence[Any], doing: str, timeout: float | None) -> list[Any | BaseException]:
    """Results of calls to several actors, in order; in the place of one that failed, its exception.

    `ray.get` of a list would wait for a slow first one before it raised what the second says.

    Raises:
        RolloutTimeout: some did not answer in time.
    """
    import ray

    deadline = None if timeout is None else time.monotonic() + timeout
    left = list(refs)
    while left:
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, left = ray.wait(left, num_returns=len(left), timeout=1.0 if rest is None else min(rest, 1.0))
        if left and not ready and rest == 0.0:
            late = [index for index, ref in enumerate(refs) if ref in left]
            raise RolloutTimeout(
                f"{doing}: no answer of rollout engine{'s' if len(late) > 1 else ''} {', '.join(map(str, late))} in "
                f"{timeout:g} s; look at ray status and the actors' logs, or give more time: "
                "create_engines(timeouts=trlpatch.ray.Timeouts(...))"
            )
    return [_result(ref, index, doing) for index, ref in enumerate(refs)]


def _result(ref: Any, index: int, doing: str) -> Any | BaseException:
    """What `ray.get` gives or raises."""
    import ray

    try:
        return ray.get(ref)
    except Exception as error:
        return own_error(error, index, doing)
