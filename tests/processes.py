"""Processes that tests start: each has a limit, leaves no other process behind, and shows what it said when it hangs.

`subprocess.run(capture_output=True, timeout=...)` kills one process, and then reads its pipes to their end, which any
process that it has started keeps open; what they have said is lost with the TimeoutExpired.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests import warm

ROOT = Path(__file__).parents[1]

ENDS = "TRLPATCH_TEST_ENDS"
"""Tells a process when it is ended, by `time.monotonic()`, which is the host's; tests/cases.py ends a case before."""

_MARK = "TRLPATCH_TEST_RUN_"
"""How the variable begins that all processes of a run have, wherever their parents and sessions went."""
_STACKS_SECONDS = 10.0
"""For stacks to be written, once they were asked for."""
_LEAVING_SECONDS = 10.0
"""For processes to end after the one that started them: Ray's actors notice that the raylet has gone."""
_SHOWN = 4000, 20_000
"""Characters of stdout and stderr, from their ends: stacks of all threads are long."""


class Hung(AssertionError):
    """A process did not end within its limit."""


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    timeout: float,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does with its output captured as text, and end what it leaves behind.

    Args:
        command: program and arguments. `run_module` is for what need not start as a fresh interpreter.
        timeout: seconds until it is ended, with all that it has started.
        cwd: where it runs.
        env: its environment; None for that of this process.

    Raises:
        Hung: it took longer; with the stacks of its Python processes, all that were there, and the ends of its output.
    """

    def start(environ: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    return _run(command, start, timeout, os.environ if env is None else env)


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module *arguments` as `run` does, warm where that can be (tests/warm.py), else fresh.

    Raises:
        Hung: it took longer, as with `run`.
    """
    command = [sys.executable, "-m", module, *arguments]
    if not warm.available():
        return run(command, timeout=timeout, env=env)

    def start(environ: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> warm.Process:
        return warm.Process(module, arguments, ROOT, environ, out, err)

    return _run(command, start, timeout, os.environ if env is None else env)


def _run(
    command: Sequence[str | os.PathLike[str]],
    start: Callable[[Mapping[str, str], IO[bytes], IO[bytes]], subprocess.Popen[bytes] | warm.Process],
    timeout: float,
    env: Mapping[str, str],
) -> subprocess.CompletedProcess[str]:
    mark = f"{_MARK}{uuid.uuid4().hex}"
    environ = {**env, mark: "1", ENDS: str(time.monotonic() + timeout), "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(environ, out, err)
        session = process.pid if isinstance(process, warm.Process) else None
        were: list[str] = []
        late = False
        try:
            with contextlib.suppress(ProcessLookupError):  # asking for stacks ends a process by SIGABRT
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
            were = [_described(pid) for pid in marked(mark, session)]
            _ask_for_stacks(mark, session)
        finally:
            end(mark, 0.0 if process.poll() is None or late else _LEAVING_SECONDS, session)
            process.kill()
            process.wait()
        said = _text(out), _text(err)
    if late:
        words = " ".join(map(str, command))
        shown = "\n".join(
            f"end of {name}:\n{text[-most:]}"
            for name, text, most in zip(("stdout", "stderr"), said, _SHOWN, strict=True)
        )
        raise Hung(
            f"{words} has not ended after {timeout:g} s; it was ended, with all that it had started:\n"
            f"{chr(10).join(were)}\n{shown}"
        )
    return subprocess.CompletedProcess(command, process.returncode, *said)


@contextlib.contextmanager
def limited(process: subprocess.Popen[Any], seconds: float) -> Iterator[None]:
    """End a process that is still waited for after so many seconds: its pipes end, and its stacks are on stderr."""

    def end_it() -> None:
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        process.send_signal(signal.SIGABRT)
        time.sleep(_STACKS_SECONDS)
        process.kill()

    timer = threading.Timer(seconds, end_it)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def marked(mark: str, session: int | None = None) -> list[int]:
    """Processes that were started with an environment variable of that name, or are in a session, and have not ended.

    A process that was forked shows the variables with which the one that forked it has started: a warm one's session.
    """
    wanted = f"{mark}=".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if any(one.startswith(wanted) for one in variables) or (session and _session(int(place.name)) == session):
            found.append(int(place.name))
    return sorted(found)


def end(mark: str, grace: float, session: int | None = None) -> list[int]:
    """Wait up to `grace` seconds until processes have ended, kill those that have not, and return which."""
    deadline = time.monotonic() + grace
    while (left := marked(mark, session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = left
    while left:  # one that starts another while it is killed
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
        left = [pid for pid in marked(mark, session) if _state(pid) not in "DZ"]
    return killed


def _ask_for_stacks(mark: str, session: int | None) -> None:
    """By faulthandler, which Python enables at its start (PYTHONFAULTHANDLER); it ends the process."""
    asked = [pid for pid in marked(mark, session) if "python" in _described(pid)]
    for pid in asked:
        _signal(pid, signal.SIGABRT)
    deadline = time.monotonic() + _STACKS_SECONDS
    while time.monotonic() < deadline and set(asked) & set(marked(mark, session)):
        time.sleep(0.05)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children() -> list[int]:
    """Processes that this one has started and not waited for."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = place.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.append(int(place.parent.name))
    return sorted(found)


def command_of(pid: int) -> str:
    """Its words; empty when it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace").strip()


def _described(pid: int) -> str:
    """Number, state and command."""
    try:
        program = Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return f"{pid} has ended"
    return f"{pid} {_state(pid)} {program}: {command_of(pid)[:120]}"


def _session(pid: int) -> int:
    """The session that a process is in; 0 when it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _state(pid: int) -> str:
    """One letter, of ps; Z when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
