"""Calls to actors: waited for together, each with an answer or an error of its own, as trlpatch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.faults import is_a, summary, unwrapped


def own_error(error: Exception, index: int, doing: str) -> BaseException:
    """The exception to raise for what `ray.get` raised of an actor's call."""
    if is_a(error, "RayActorError"):  # ActorDiedError and ActorUnavailableError
        lost = EngineLost(f"{doing}: rollout engine {index} is lost, its actor has died: {summary(error)}")
        lost.__cause__ = error
        return lost
    return unwrapped(error)


def settled(refs: Sequence[Any], doing: str, timeout: float) -> tuple[list[Any | BaseException], list[int]]:
    """(results in order, in the place of a call that failed its exception; places of those not answered in time).

    `ray.get` of a list would wait for a slow first one before it raised what the second says.
    """
    import ray

    limit = timeout if math.isfinite(timeout) else None
    answered = set(ray.wait(list(refs), num_returns=len(refs), timeout=limit)[0]) if refs else set()
    late = [index for index, ref in enumerate(refs) if ref not in answered]
    return [None if index in late else _result(ref, index, doing) for index, ref in enumerate(refs)], late


def gather(refs: Sequence[Any], doing: str, timeout: float) -> list[Any | BaseException]:
    """Results of calls to several actors, as of `settled`.

    Raises:
        RolloutTimeout: some did not answer in time.
    """
    results, late = settled(refs, doing, timeout)
    if late:
        raise RolloutTimeout(
            f"{doing}: no answer of rollout engine{'s' if len(late) > 1 else ''} {', '.join(map(str, late))} in "
            f"{timeout:g} s; look at ray status and the actors' logs, or give more time: "
            "create_engines(timeouts=trlpatch.ray.Timeouts(...))"
        )
    return results


def _result(ref: Any, index: int, doing: str) -> Any | BaseException:
    """What `ray.get` gives or raises."""
    import ray

    try:
        return ray.get(ref)
    except Exception as error:
        return own_error(error, index, doing)
