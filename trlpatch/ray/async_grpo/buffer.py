"""The queue that AsyncGRPOTrainer takes samples from: what is stale never comes out of it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

_WAKE = object()
"""Put in to wake who waits; never handed out."""


class RolloutBuffer(queue.Queue[Any]):
    """A `queue.Queue` whose `get` gives what `open_` makes of an entry, and passes over an entry it makes None of.

    The trainer would drop a stale sample itself, and nobody would know: the prompt would be lost.
    """

    def __init__(self, open_: Callable[[Any], Any | None]) -> None:
        """`open_(entry)` is called when an entry is taken, in the trainer's thread."""
        super().__init__()
        self._open = open_
        self._failure: Callable[[], BaseException] | None = None

    def fail(self, error: Callable[[], BaseException]) -> None:
        """From now on `get` raises `error()`: there will be no more samples."""
        self._failure = error
        self.put_nowait(_WAKE)

    def restart(self) -> None:
        """Take back what `fail` did, and forget what is in the queue."""
        self._failure = None
        while True:
            try:
                super().get(block=False)
            except queue.Empty:
                return

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take a sample.

        Raises:
            queue.Empty: none came in time.
            RolloutWorkerFailed: none will come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._failure is not None:
                raise self._failure()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            entry = super().get(block, left)
            sample = None if entry is _WAKE else self._open(entry)
            if sample is not None:
                return sample
