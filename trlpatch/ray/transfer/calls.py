"""Calls of several actors at once, each with an answer or an error of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trlpatch.errors import RolloutTimeout
from trlpatch.ray.calls import settled

_CONTROL = "control"
"""The actor's concurrency group for what must be answered at once."""


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
        """See Calls. `lose` goes by the group that answers while all others wait."""
        called = getattr(handle, method)
        return (called.options(concurrency_group=_CONTROL) if method == "lose" else called).remote(*args)

    def settle(self, pending: Sequence[Any], timeout: float) -> list[Any]:
        """See Calls."""
        answers, late = settled(pending, "sending weights", timeout)
        for index in late:
            answers[index] = RolloutTimeout(f"no answer in {timeout:g} s (timeouts.sync)")
        return answers
