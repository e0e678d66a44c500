"""Cases of a run in a process of its own: each says when it begins and ends, and none lasts longer than its limit.

A case that lasts longer is interrupted where it is, after the stacks of all threads were shown, so that what is around
it (a cluster) is shut down. One that cannot be interrupted ends the process, before tests/processes.py does.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.processes import ENDS

SPARE = 90.0
"""Seconds of a run's limit that are left for what is around the cases."""
GRACE = 40.0
"""Seconds for a case to end, once it was interrupted."""


class CaseOverdue(BaseException):
    """A case lasts too long. Not an Exception: nothing is to take it for an engine's or a trainer's error."""


@contextmanager
def case(name: str, seconds: float, *, spare: float = SPARE) -> Iterator[None]:
    """Run a case, in the main thread, for at most `seconds` and what the whole run has left but for `spare`.

    Raises:
        CaseOverdue: it took longer; stderr has the stacks.
    """
    limit = max(1.0, min(seconds, _left() - spare))
    began = time.monotonic()

    def overdue(*_: Any) -> None:
        _say(f"{name} has not ended after {limit:.0f} s and is interrupted; stacks:")
        faulthandler.dump_traceback(all_threads=True)
        raise CaseOverdue(f"{name} has not ended after {limit:.0f} s")

    _say(f"{name} began; limit {limit:.0f} s")
    faulthandler.dump_traceback_later(limit + GRACE, exit=True)
    before = signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, limit)
    how = "failed"
    try:
        yield
        how = "ended"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        _say(f"{name} {how} after {time.monotonic() - began:.1f} s")


def _left() -> float:
    """Seconds until the process is ended by the one that has started it."""
    return float(os.environ.get(ENDS, "inf")) - time.monotonic()


def _say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} case {words}", file=sys.stderr, flush=True)
