"""Nothing half-written stays; what a killed process left goes; a full disk is seen before it is full."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from trlpatch.errors import CannotExport
from trlpatch.export import space
from trlpatch.export.scratch import scratch_folder
from trlpatch.export.space import free_memory, gib, need_disk


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def half() -> None:
        with scratch_folder(tmp_path) as scratch:
            (scratch / "half").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        half()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_left_alone(tmp_path: Path) -> None:
    host = socket.gethostname().replace("-", "_").replace(".", "_")
    dead = next(number for number in range(400_000, 10**7) if not Path(f"/proc/{number}").exists())
    left = tmp_path / f".trlpatch-export-{host}-{dead}-abc"
    running = tmp_path / f".trlpatch-export-{host}-{os.getppid()}-abc"
    elsewhere = tmp_path / f".trlpatch-export-another_host-{dead}-abc"
    for folder in (left, running, elsewhere):
        folder.mkdir()
    with scratch_folder(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([running, elsewhere])


@pytest.mark.parametrize("written", [False, True])
def test_what_was_moved_aside_by_a_killed_process_goes_back(tmp_path: Path, written: bool) -> None:
    """A kill between the two renames of a replaced directory, or behind them."""
    host = socket.gethostname().replace("-", "_").replace(".", "_")
    dead = next(number for number in range(400_000, 10**7) if not Path(f"/proc/{number}").exists())
    earlier = tmp_path / f".trlpatch-export-{host}-{dead}-abc" / "earlier" / "out"
    earlier.mkdir(parents=True)
    (earlier / "model").write_text("earlier")
    if written:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model").write_text("new")
    with scratch_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model").read_text() == ("new" if written else "earlier")


def test_a_disk_that_will_be_full_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    need_disk(tmp_path, 900 << 20, "q8_0")
    with pytest.raises(CannotExport, match=r"writing q8_0, f32 to .*expected 1\.06 GiB free .* found 1\.00 GiB"):
        need_disk(tmp_path, 1 << 30, "q8_0, f32")


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"/sys/fs/cgroup/memory.max": 3 << 20, "/sys/fs/cgroup/memory.current": 1 << 20}
    monkeypatch.setattr(space, "_number", lambda path: numbers.get(str(path)))
    assert free_memory() == 2 << 20
    monkeypatch.setattr(space, "_number", lambda path: None)
    assert free_memory() > 2 << 20


def test_sizes_for_people() -> None:
    assert (gib(3 << 29), gib(3 << 19)) == ("1.50 GiB", "1.5 MiB")
