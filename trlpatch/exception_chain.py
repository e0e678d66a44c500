"""The exceptions behind an exception: Python's `__cause__` and `__context__`, followed to the end."""

from __future__ import annotations


def exception_chain(error: BaseException) -> list[BaseException]:
    """Return `error` and every exception it was raised from or while handling, each once, `error` first."""
    chain: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and not any(one is seen for seen in chain):
            chain.append(one)
            waiting += [one.__context__, one.__cause__]
    return chain
