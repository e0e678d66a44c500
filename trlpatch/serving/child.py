"""The server's process: started under the guard, in a session of its own, with a log; ended with all it started."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")

GRACE = 15.0
"""Seconds from SIGTERM to SIGKILL. vLLM 0.28 gives its engine core five of them."""

_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR = re.compile(r"\b[A-Za-z.]*(Error|Exception)\b: |\berror: |^[\d.]+ E ")


class Child:
    """A server and the processes that it starts.

    Ctrl-C on the terminal does not reach it: whoever started it says when it ends. It ends with its parent, however
    that one ends.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        self.command = list(command)
        self._private = Path(tempfile.mkdtemp(prefix="trlpatch-serve-")) if log is None else None
        self.log = log if self._private is None else self._private / "server.log"
        assert self.log is not None
        read, write = os.pipe()
        try:
            with self.log.open("wb") as out:
                self._guard = subprocess.Popen(
                    # -I: the guard needs the standard library alone, whatever PYTHONPATH and the directory hold.
                    [sys.executable, "-I", str(GUARD), str(os.getpid()), str(write), str(GRACE), *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=(write,),
                )
        except BaseException:
            os.close(read)
            self.forget_log()
            raise
        finally:
            os.close(write)
        with os.fdopen(read, "rb") as report:
            self.pid = int(report.readline() or b"0")

    def status(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._guard.poll()

    def stop(self) -> None:
        """End the server and everything it started; does nothing where it has ended."""
        if self._guard.poll() is None:
            self._guard.terminate()
            try:
                self._guard.wait(GRACE + 10)
            except BaseException as error:  # also a second Ctrl-C: then at once
                self._kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        if self._guard.returncode < 0:  # somebody killed the guard, which can therefore clean up nothing
            self._kill()

    def _kill(self) -> None:
        self._guard.kill()
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._guard.wait()

    def tail(self, lines: int = 25) -> list[str]:
        """Return the last lines of the log, without escape codes and empty lines."""
        return self._lines()[-lines:]

    def errors(self, most: int = 3) -> list[str]:
        """Return the first distinct lines of the log that state an error: the cause comes before its consequences."""
        found = [line.strip() for line in self._lines() if _ERROR.search(line)]
        return list(dict.fromkeys(found))[:most]

    def _lines(self) -> list[str]:
        assert self.log is not None
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        lines = (_ESCAPE.sub("", line).rpartition("\r")[2].rstrip() for line in text.split("\n"))
        return [line for line in lines if line]

    def forget_log(self) -> None:
        """Remove the log, unless the caller named its place."""
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
