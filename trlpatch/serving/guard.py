"""Run a command in a process group of its own, and end that group when the process that asked for it is gone.

Run as a file, `python -I guard.py PARENT REPORT GRACE COMMAND...`: PARENT is the process that must live, REPORT a file
descriptor that the command's process id is written to, GRACE how many seconds it has to end after SIGTERM. Exits with
the command's status, 128 + n where signal n ended it.

It watches its parent process. PR_SET_PDEATHSIG alone would not do: it speaks of the parent's *thread* (prctl(2)), so
that a server which a worker thread starts would die with the thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
WATCHED = ENDING | {signal.SIGCHLD}
POLL = 0.2
LAST_WORDS = 3.0
"""Seconds that the rest of the group has to end once its leader is gone: vLLM's engine core, resource trackers."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)


def _before_exec() -> None:
    """In the command's process: die with the guard, and take signals as if nobody had blocked them."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


def run(parent: int, report: int, grace: float, command: list[str]) -> int:
    """Run `command` until it ends, a signal comes or `parent` is no longer this process's parent; return a status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    # What the command leaves behind becomes a child of this process, which can then wait for it.
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    leader = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_before_exec)
    os.write(report, f"{leader.pid}\n".encode())
    os.close(report)
    deadline: float | None = None
    while leader.poll() is None:
        got = signal.sigtimedwait(WATCHED, POLL)
        asked = got is not None and got.si_signo in ENDING
        if deadline is None and (asked or os.getppid() != parent):
            leader.terminate()
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            _signal_group(leader.pid, signal.SIGKILL)
    _end_group(leader.pid)
    return leader.returncode if leader.returncode >= 0 else 128 - leader.returncode


def _end_group(group: int) -> None:
    """End what is left of a group whose leader has ended: SIGTERM, and after LAST_WORDS SIGKILL."""
    for number, seconds in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, LAST_WORDS)):
        if not _signal_group(group, number):
            return
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if os.waitpid(-group, os.WNOHANG) == (0, 0):
                    time.sleep(0.02)
            except ChildProcessError:
                return


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to the group; False where nobody is in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
