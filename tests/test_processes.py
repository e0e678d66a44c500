"""tests/processes.py and tests/cases.py: a run that hangs says where, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import processes, warm
from tests.cases import SPARE
from tests.processes import Hung

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by Linux's /proc")

LEAVES_ONE = """
import subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("other", other.pid, flush=True)
"""
"""Starts a process that has its output and a session of its own, as Ray's actors have."""

HANGS = """
import pathlib, threading
def stuck_here():
    pathlib.Path(sys.argv[1]).touch()
    threading.Event().wait()
print("last words", flush=True)
stuck_here()
"""


WARM = f"""
import atexit, os, sys
print(__name__, sys.argv[1:], os.environ["GIVEN"], os.getcwd(), "warm" if "preloaded" in sys.modules else "fresh")
atexit.register(print, "at its end")
{LEAVES_ONE}
if sys.argv[2] == "raise":
    1 / 0
if sys.argv[2] == "exit":
    sys.exit(3)
{HANGS}
"""

INNER = f"""
import os, sys
print(*[name for name in os.environ if name.startswith({processes._MARK!r})], file=sys.stderr)
"""


def alive(pid: int) -> bool:
    """Does it run? One that nobody has waited for does not."""
    return processes._state(pid) != "Z"


def other(text: str) -> int:
    """The process that LEAVES_ONE names."""
    found = re.search(r"other (\d+)", text)
    assert found is not None, text
    return int(found.group(1))


def test_what_hangs_shows_its_stack_and_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    wait = subprocess.Popen.wait

    def until_it_hangs(self: subprocess.Popen[Any], timeout: float | None = None) -> int:
        if timeout != 77.0:
            return wait(self, timeout)
        while not hangs.exists():
            assert self.poll() is None
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_hangs)
    with pytest.raises(Hung) as hung:
        processes.run([sys.executable, "-c", LEAVES_ONE + HANGS, str(hangs)], timeout=77.0)
    said = str(hung.value)
    assert "has not ended after 77 s" in said
    assert "in stuck_here" in said, "the stack, by faulthandler"
    assert "last words" in said
    pid = other(said)
    assert re.search(rf"^{pid} \w python\S*: ", said, re.MULTILINE), "it is listed among those that were there"
    assert not alive(pid)


def test_what_ends_leaves_nothing_behind_and_is_not_waited_for_by_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LEAVING_SECONDS", 0.2)
    done = processes.run([sys.executable, "-c", LEAVES_ONE + "sys.exit(3)"], timeout=600.0)
    assert done.returncode == 3
    assert not alive(other(done.stdout))


def test_processes_of_a_run_in_a_run_are_its_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(processes._MARK)]:
        monkeypatch.delenv(name)
    code = f"""import sys
from tests import processes
sys.stderr.write(processes.run([sys.executable, "-c", {INNER!r}], timeout=600.0).stderr)
"""
    done = processes.run([sys.executable, "-c", code], timeout=600.0)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(processes._MARK) == 2, f"the marks of both runs: {done.stderr}"


def test_a_process_that_says_nothing_is_ended() -> None:
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with processes.limited(process, 1.0):
            assert process.stdout.readline() == b""
    assert process.returncode != 0


OVERDUE = """
import threading
from tests import cases
cases.GRACE = 1.0

def stuck_here():
    {before}
    threading.Event().wait()

try:
    with cases.case("first", 600.0):
        pass
    with cases.case("second", 1.0):
        stuck_here()
finally:
    print("the cluster is shut down", flush=True)
"""


def test_a_case_that_lasts_too_long_says_where_and_what_is_around_it_ends() -> None:
    done = processes.run([sys.executable, "-c", OVERDUE.format(before="pass")], timeout=600.0)
    assert done.returncode == 1
    assert re.search(r"case first ended after .*case second began; limit 1 s", done.stderr, re.DOTALL)
    assert "second has not ended after 1 s and is interrupted" in done.stderr
    assert "in stuck_here" in done.stderr
    assert "the cluster is shut down" in done.stdout


def test_a_case_that_cannot_be_interrupted_ends_the_process() -> None:
    deaf = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])"
    done = processes.run([sys.executable, "-c", OVERDUE.format(before=deaf)], timeout=600.0)
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr, "faulthandler's"
    assert "in stuck_here" in done.stderr
    assert "the cluster" not in done.stdout


def test_a_case_ends_before_the_run_is_ended() -> None:
    code = "from tests import cases\nwith cases.case('one', 600.0): pass"
    done = processes.run([sys.executable, "-c", code], timeout=SPARE + 60)
    limit = re.search(r"one began; limit (\d+) s", done.stderr)
    assert limit is not None, done.stderr
    assert 0 < int(limit.group(1)) <= 60


def test_a_warm_process_is_like_a_fresh_one_and_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    wait = warm.Process.wait

    def until_it_hangs(self: warm.Process, timeout: float | None = None) -> int:
        if timeout != 77.0:
            return wait(self, timeout)
        while not hangs.exists():
            assert self.poll() is None
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("it", timeout)

    (tmp_path / "runs_warm.py").write_text(WARM, encoding="utf-8")
    (tmp_path / "preloaded.py").touch()
    monkeypatch.setattr(processes, "_LEAVING_SECONDS", 0.1)
    path = os.pathsep.join([str(tmp_path), str(processes.ROOT)])
    environ = {**os.environ, "PYTHONPATH": path, "GIVEN": "to the run"}
    with warm.serving(Path(sys.executable), processes.ROOT, environ, ["preloaded"]) as variables:
        monkeypatch.setattr(warm, "_SOCKET", variables[warm.VARIABLE])
        done = processes.run_module("runs_warm", ["word", "exit"], env=environ, timeout=600.0)
        assert done.returncode == 3, done.stderr
        said = done.stdout.splitlines()
        assert said[0] == f"__main__ ['word', 'exit'] to the run {processes.ROOT} warm"
        assert "at its end" in said
        assert "Traceback" not in done.stderr
        assert not alive(other(done.stdout))

        words = [sys.executable, "-m", "tests.warm", "run", "runs_warm", "word", "exit"]
        launched = processes.run(words, env={**environ, **warm.variables()}, timeout=600.0)
        assert (launched.returncode, launched.stdout.splitlines()[0].split()[-1]) == (3, "warm"), launched.stderr

        failed = processes.run_module("runs_warm", ["word", "raise"], env=environ, timeout=600.0)
        assert failed.returncode == 1
        assert "ZeroDivisionError" in failed.stderr

        monkeypatch.setattr(warm.Process, "wait", until_it_hangs)
        with pytest.raises(Hung, match="stuck_here") as hung:
            processes.run_module("runs_warm", [str(hangs), "hang"], env=environ, timeout=77.0)
        assert not alive(other(str(hung.value)))
        assert processes.run_module("runs_warm", ["word", "exit"], env=environ, timeout=600.0).returncode == 3


def test_without_one_that_forks_it_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs_warm.py").write_text(WARM, encoding="utf-8")
    monkeypatch.setattr(warm, "_SOCKET", None)
    monkeypatch.setattr(processes, "_LEAVING_SECONDS", 0.1)
    path = os.pathsep.join([str(tmp_path), str(processes.ROOT)])
    done = processes.run_module(
        "runs_warm", ["word", "exit"], env={**os.environ, "PYTHONPATH": path, "GIVEN": "to the run"}, timeout=600.0
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[0] == f"__main__ ['word', 'exit'] to the run {processes.ROOT} fresh"
