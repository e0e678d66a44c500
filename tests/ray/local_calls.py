"""Actors in this process: what Ray does for `WeightSender`, with threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.timeouts import Timeouts


class LocalCalls:
    """Calls methods of plain objects, each call in a thread; `hook(handle, method, args)` runs before it."""

    def __init__(self, hook: Callable[[Any, str, tuple[Any, ...]], None] | None = None) -> None:
        self._threads = ThreadPoolExecutor()
        self._hook = hook
        self.made: list[tuple[Any, str]] = []

    def put(self, value: Any) -> Any:
        return value

    def ask(self, handle: Any, method: str, *args: Any) -> Future[Any]:
        self.made.append((handle, method))
        return self._threads.submit(self._call, handle, method, args)

    def settle(self, pending: Sequence[Future[Any]], timeout: float) -> list[Any]:
        answers: list[Any] = []
        end = time.monotonic() + timeout
        for future in pending:
            try:
                answers.append(future.result(max(0.0, end - time.monotonic())))
            except FutureTimeout:
                answers.append(RolloutTimeout("no answer"))
            except Exception as error:
                answers.append(error)
        return answers

    def _call(self, handle: Any, method: str, args: tuple[Any, ...]) -> Any:
        if self._hook is not None:
            self._hook(handle, method, args)
        return getattr(handle, method)(*args)


@dataclass
class LocalEngines:
    """What a sender needs of `RayEngines`."""

    handles: list[Any]
    timeouts: Timeouts = field(default_factory=Timeouts)
    weights_version: str = "0"
    lost: list[int] = field(default_factory=list)

    def took_weights(self, version: str) -> None:
        self.weights_version = version

    def replaced(self, error: EngineLost, index: int) -> None:
        self.lost.append(index)
        raise error
