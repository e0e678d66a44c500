"""Calls of several actors at once, each with an answer or an error of its own. The only module here that knows Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from trlpatch.errors import RolloutTimeout


class Calls(Protocol):
    """How actors are called."""

    def put(self, value: Any) -> Any:
        """Copy a value to where all actors get it; the reference, which keeps it there."""

    def ask(self, handle: Any, method: str, *args: Any) -> Any:
        """Begin a call, and return what `settle` waits for."""

    def settle(self, pending: Sequence[Any], timeout: float) -> list[Any]:
        """Wait for all, together `timeout` seconds at most: answers, or the exceptions in their places."""


class RayCalls:
    """Of Ray actors."""

    def put(self, value: Any) -> Any:
        """Copy it into the object store, once for all engines of a node."""
        import ray

        return ray.put(value)

    def ask(self, handle: Any, method: str, *args: Any) -> Any:
        """See Calls."""
        return getattr(handle, method).remote(*args)

    def settle(self, pending: Sequence[Any], timeout: float) -> list[Any]:
        """See Calls; `ray.get` of several waits for the first one's answer before it raises the second one's error."""
        import ray

        started = time.monotonic()
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=timeout)
        answered = set(done)
        answers: list[Any] = []
        for reference in pending:
            if reference not in answered:
                answers.append(RolloutTimeout(f"no answer in {time.monotonic() - started:.0f} s"))
                continue
            try:
                answers.append(ray.get(reference))
            except Exception as error:
                answers.append(error)
        return answers
