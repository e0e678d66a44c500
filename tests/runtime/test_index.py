from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from trlpatch.runtime import index as indexing
from trlpatch.runtime.cache import INDEX, Cache
from trlpatch.runtime.index import Index, Stamp, stamp

ASKED = ("census", "/site/trl", "1.16.0")
HOUR = 3600 * 10**9


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(Cache(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package with a folder in it, a link in a circle and what no import looks at."""
    root = tmp_path / "package"
    (root / "inner" / "__pycache__").mkdir(parents=True)
    for file in ("a.py", "inner/b.py", "inner/data.json", "inner/__pycache__/c.py"):
        (root / file).write_text("x = 1\n", encoding="utf-8")
    (root / "inner" / "circle").symlink_to(root)
    return root


@pytest.fixture
def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test wrote just now count as settled. (No call sets a ctime back.)"""
    now = time.time_ns
    monkeypatch.setattr(indexing.time, "time_ns", lambda: now() + HOUR)


def test_an_answer_is_recalled_with_the_same_stats(index, tree, an_hour_later):
    before = stamp(trees=[tree])
    assert index.recall(ASKED, before) is None
    assert index.record(ASKED, before, ["found", 2])
    assert index.recall(ASKED, stamp(trees=[tree])) == ["found", 2]
    assert index.recall((*ASKED, "skip"), stamp(trees=[tree])) is None


def _same_size_and_mtime(path: Path) -> None:
    before = path.stat()
    path.write_text("x = 2\n", encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def _replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_text("x = 2\n", encoding="utf-8")
    other.replace(path)


EDITS = {
    "another size": lambda tree: (tree / "a.py").write_text("x = 11\n", encoding="utf-8"),
    "the same size": lambda tree: (tree / "a.py").write_text("x = 2\n", encoding="utf-8"),
    "the same size and mtime": lambda tree: _same_size_and_mtime(tree / "inner" / "b.py"),
    "another file in its place": lambda tree: _replaced(tree / "a.py"),
    "a new file": lambda tree: (tree / "inner" / "new.py").touch(),
    "a file is gone": lambda tree: (tree / "inner" / "b.py").unlink(),
    "a file has another name": lambda tree: (tree / "a.py").rename(tree / "z.py"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edit_of_any_file_is_noticed(index, tree, an_hour_later, edit):
    assert index.record(ASKED, stamp(trees=[tree]), "answer")
    time.sleep(0.02)  # the tick of the file system's clock: in use, `settled` sees to this
    edit(tree)
    assert index.recall(ASKED, stamp(trees=[tree])) is None


def test_what_no_import_looks_at_changes_nothing(tree):
    before = stamp(trees=[tree])
    (tree / "inner" / "data.json").write_text("2", encoding="utf-8")
    (tree / "inner" / "__pycache__" / "c.py").write_text("2", encoding="utf-8")
    assert stamp(trees=[tree]).digest == before.digest


def test_a_file_that_is_not_there_is_a_fact_too(tree):
    before = stamp([tree / "later.py"])
    assert before != stamp([tree / "a.py"])
    (tree / "later.py").touch()
    assert stamp([tree / "later.py"]).digest != before.digest


def test_nothing_is_recorded_about_a_file_that_changed_just_now(index, tree):
    # An edit in the same tick of the file system's clock would leave the same stats.
    assert not stamp(trees=[tree]).settled
    assert not index.record(ASKED, stamp(trees=[tree]), "answer")
    assert index.recall(ASKED, stamp(trees=[tree])) is None


@pytest.mark.parametrize("seconds", [-1, 0, 1, 2, 3])
def test_settled_two_seconds_after_the_newest_change(tree, monkeypatch, seconds):
    changed = (tree / "a.py").stat().st_ctime_ns
    monkeypatch.setattr(indexing.time, "time_ns", lambda: changed + seconds * 10**9)
    assert stamp([tree / "a.py"]).settled is (seconds > 2)


def test_a_file_from_the_future_is_never_settled(tree, an_hour_later):
    os.utime(tree / "a.py", ns=(0, time.time_ns() + 10 * HOUR))
    assert not stamp([tree / "a.py"]).settled


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "binary": lambda file: file.write_bytes(b"\xff\x00"),
    "a list": lambda file: file.write_bytes(b"[]"),
    "no answer": lambda file: file.write_text(json.dumps({"stamp": json.loads(file.read_bytes())["stamp"]})),
    "deep": lambda file: file.write_bytes(b"[" * 100_000),
    "all may write the folder": lambda file: file.parent.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_answer_is_none(index, tree, an_hour_later, damage, tmp_path):
    known = stamp(trees=[tree])
    assert index.record(ASKED, known, "answer")
    (file,) = (tmp_path / "cache" / INDEX).iterdir()
    damage(file)
    assert index.recall(ASKED, known) is None


def test_an_index_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert not Index(Cache(tmp_path / "file")).record(ASKED, Stamp("0", settled=True), "answer")
