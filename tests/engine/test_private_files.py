from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trlpatch.engine import private_files
from trlpatch.engine.private_files import private_directory


class Owner:
    pass


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(private_files, "_MEMORY", tmp_path)


def test_it_goes_with_its_owner() -> None:
    owner = Owner()
    directory, _ = private_directory(owner)
    assert directory.stat().st_mode & 0o777 == 0o700
    del owner
    gc.collect()
    assert not directory.exists()


def test_a_forked_child_takes_nothing_with_it() -> None:
    owner = Owner()
    directory, remove = private_directory(owner)
    child = os.fork()
    if not child:
        remove()  # what exit handlers call
        os._exit(0)
    os.waitpid(child, 0)
    assert directory.exists()
    remove()
    assert not directory.exists()


MAKES_ONE = """
import sys, time
from pathlib import Path
from trlpatch.engine import private_files
private_files._MEMORY = Path(sys.argv[1])
class Owner: pass
owner = Owner()
print(private_files.private_directory(owner)[0], flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", MAKES_ONE, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        mine = [private_directory(owner := Owner())]
        assert theirs.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        mine.append(private_directory(second := Owner()))
        assert not theirs.exists()
        assert all(directory.exists() for directory, _ in mine)
        del owner, second


def test_what_is_in_the_making_or_anothers_is_left_alone(tmp_path: Path) -> None:
    half = tmp_path / "trlpatch-adapter-half"
    half.mkdir()
    owner = Owner()
    private_directory(owner)
    assert half.exists()


def test_a_directory_that_another_process_sweeps_away_in_the_making_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when all ranks of a node hand their first adapter over."""
    lock, swept = fcntl.flock, []

    def after_the_others_sweep(file: int, operation: int) -> None:
        if not swept:
            swept.append(operation)
            private_files._sweep()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_others_sweep)
    owner = Owner()
    directory, _ = private_directory(owner)
    assert swept
    assert directory.exists()
