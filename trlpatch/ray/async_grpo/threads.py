"""Blocking calls beside an event loop, in threads that keep no interpreter from ending."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Await `function(*args, **kwargs)` in a daemon thread of its own.

    `asyncio.to_thread` and executors use threads that are joined when the interpreter ends: an engine that does not
    answer would hang it.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        if answer.done():  # cancelled meanwhile
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failed = None, None
        try:
            result = context.run(function, *args, **kwargs)
        except BaseException as error:
            # A future takes no StopIteration.
            failed = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name=f"trlpatch-{getattr(function, '__name__', 'call')}", daemon=True).start()
    return await answer
