"""Actors in this process: what Ray does for `WeightSender`, with threads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.timeouts import Timeouts


class LocalCalls:
    """Calls methods of plain objects, each call in a thread; `hook(handle, method, args)` runs before it.

    What `silent` names, engine and method, has not been answered when the time is over. No clock is looked at.
    """

    def __init__(
        self,
        hook: Callable[[Any, str, tuple[Any, ...]], None] | None = None,
        silent: Collection[tuple[Any, str]] = (),
    ) -> None:
        self._threads = ThreadPoolExecutor()
        self._hook = hook
        self._silent = silent

    def put(self, value: Any) -> Any:
        return value

    def ask(self, handle: Any, method: str, *args: Any) -> Future[Any] | None:
        if (handle, method) in self._silent:
            return None
        return self._threads.submit(self._call, handle, method, args)

    def settle(self, pending: Sequence[Future[Any] | None], timeout: float) -> list[Any]:
        answers: list[Any] = []
        for future in pending:
            try:
                answers.append(RolloutTimeout(f"no answer in {timeout:g} s") if future is None else future.result())
            except Exception as error:
                answers.append(error)
        return answers

    def close(self) -> None:
        """Wait for every call."""
        self._threads.shutdown()

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
