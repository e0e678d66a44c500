"""Occupancy of an engine: which thread generates on it, and requests that nobody waits for any more.

`LLM.generate` returns every request that finishes while it runs, whoever added it. What an interrupt leaves behind
would be the next caller's answers; and an adapter or weights written while requests run make completions of two
policies.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trlpatch.errors import EngineBusy
from trlpatch.log import logger

if TYPE_CHECKING:
    from trlpatch.engine.protocols import LLMEngine, LoraRequest

_UNDECIDED: Any = object()
_PATIENCE = 0.05
"""Seconds between two looks at who holds an engine that is being waited for."""


class Call:
    """One call of the engine's API, or the requests that a caller has added by hand since it was idle last."""

    def __init__(self) -> None:
        self.decided: LoraRequest | None = _UNDECIDED

    @property
    def open(self) -> bool:
        """Has nobody said yet what its requests without an adapter get?"""
        return self.decided is _UNDECIDED


class Occupancy:
    """Who works with one engine; one thread at a time generates, hands over or sleeps."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._calls: list[Call] = []
        self._generating: threading.Thread | None = None
        self._by_hand: tuple[threading.Thread, Call] | None = None

    # Generating.

    @contextmanager
    def call(self, inner: LLMEngine) -> Iterator[None]:
        """Run `LLM.generate` or the like: another thread's call waits, one that fails leaves no request behind."""
        with self._lock:
            if self._calls:  # `chat` calls `generate`
                yield
                return
            before = set(requests(inner))
            self._calls.append(Call())
            self._generating = threading.current_thread()
            try:
                yield
            except BaseException as error:
                _clean_up(inner, before, error)
                raise
            finally:
                self._generating = None
                self._calls.clear()

    def adding(self, inner: LLMEngine) -> Call:
        """Give the call that a request is added in; for those added by hand, one until all of them are answered."""
        me = threading.current_thread()
        if self._calls and self._generating is me:
            return self._calls[0]
        if self._by_hand is None or not requests(inner):
            self._by_hand = (me, Call())
        return self._by_hand[1]

    # Everything else.

    @contextmanager
    def handing_over(self, inner: LLMEngine, doing: str, *, abort: bool = False, wait: bool = False) -> Iterator[None]:
        """Keep other threads from generating meanwhile. With `abort` requests left by this thread are dropped first.

        Raises:
            EngineBusy: another thread generates, and `wait` does not say to wait for it.
        """
        if wait:
            self._lock.acquire()
        else:
            self._acquire(doing)
        try:
            if not self._calls:
                self._refuse_others(inner, doing)
                if abort:
                    abort_leftovers(inner, doing)
            yield
        finally:
            self._lock.release()

    def refuse_mixed(self, inner: LLMEngine, doing: str) -> None:
        """Another adapter has just been handed over: abort requests that began with the one before.

        Raises:
            EngineBusy: there were some.
        """
        left = [] if self._calls else requests(inner)
        if left:
            abort_requests(inner, left)
            raise EngineBusy(
                f"{doing}: the adapter has changed, and {len(left)} requests added to the engine before are "
                "unfinished: their completions would be of two policies, and they were aborted; expected all requests "
                "of a version to be finished before the adapter is trained further"
            )

    def _acquire(self, doing: str) -> None:
        while not self._lock.acquire(timeout=_PATIENCE):
            generating = self._generating
            if generating is not None:
                raise EngineBusy(
                    f"{doing}: thread {generating.name!r} is generating on the engine, and its completions would be "
                    "of two policies; nothing was changed; expected an idle engine: wait until its generate() returns"
                )

    def _refuse_others(self, inner: LLMEngine, doing: str) -> None:
        if self._by_hand is None:
            return
        thread, _ = self._by_hand
        if thread is not threading.current_thread() and thread.is_alive() and requests(inner):
            raise EngineBusy(
                f"{doing}: {len(requests(inner))} requests of thread {thread.name!r} are unfinished, and their "
                "completions would be of two policies; nothing was changed; expected an idle engine: let the thread "
                "finish them, or abort them with llm.llm_engine.abort_request(...)"
            )


def requests(inner: LLMEngine) -> list[str]:
    """Name the unfinished requests, as vLLM does inside; none where this engine does not say."""
    return list(getattr(getattr(inner, "output_processor", None), "request_states", None) or ())


def abort_leftovers(inner: LLMEngine, doing: str) -> None:
    """Abort what is unfinished, with a warning: it would be answered to the caller that follows."""
    left = requests(inner)
    if not left:
        return
    abort_requests(inner, left)
    logger.warning(
        "%s: %d requests that an interrupted or failed rollout left in the engine were aborted; their answers would "
        "have been given to this caller",
        doing,
        len(left),
    )


def abort_requests(inner: Any, names: list[str]) -> None:
    """Abort requests by the names that `requests` gives, and the parents of n > 1."""
    parents = getattr(inner.output_processor, "parent_requests", None) or ()  # of n > 1
    names = [*names, *parents]
    if "internal" in inspect.signature(inner.abort_request).parameters:  # 0.13: the caller's names are others
        inner.abort_request(names, internal=True)
    else:
        inner.abort_request(names)


def _clean_up(inner: LLMEngine, before: set[str], error: BaseException) -> None:
    left = [name for name in requests(inner) if name not in before]
    if not left:
        return
    try:
        abort_requests(inner, left)
    except Exception as second:  # an engine that has died
        error.add_note(f"{len(left)} unfinished requests could not be aborted: {second!r}")
    else:
        logger.warning("%d unfinished requests of a call that ended in %r were aborted", len(left), error)
