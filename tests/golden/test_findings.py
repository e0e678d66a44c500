"""Whatever is wrong with golden/ is found and named, and an update of some releases keeps the others."""

from __future__ import annotations

import difflib
import itertools
import json
from typing import TYPE_CHECKING

import pytest

from tests.golden.goldens import findings, tree_findings, without_line_numbers
from tests.golden.store import CannotUpdate, Golden, dumps, layout, loads, read, tidy, update, write

if TYPE_CHECKING:
    from pathlib import Path

RELEASES = ["1.9.0", "1.10.0", "1.11.0"]
DIFF = "--- a/trl/a.py\n+++ b/trl/a.py\n@@ f @@\n-old\n+new\n"
OTHER = DIFF.replace("new", "other")


def golden(release: str, diff: str = DIFF, **entry: object) -> Golden:
    plan = {"plan": ["p@>=1"], "anchors": {"p": {"a": 1}}, "touched": ["f"], "skipped": {}}
    return Golden(
        {"file": "trl/a.py", "upstream_sha256": f"up{release}", "patched_sha256": f"now{release}", **plan, **entry},
        diff,
    )


GOLDENS = {"a": {"1.9.0": golden("1.9.0"), "1.10.0": golden("1.10.0"), "1.11.0": golden("1.11.0", OTHER)}}
FILES = layout(GOLDENS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A golden/ with three releases of one target, two of which have the same diff."""
    (tmp_path / "releases.toml").touch()
    write(FILES, tmp_path)
    return tmp_path


def found(root: Path, version: str = "1.10.0", **changed: object) -> list[str]:
    return list(findings(version, {"a": golden(version, **changed)}, root))  # type: ignore[arg-type]


def in_tree(root: Path) -> list[str]:
    return list(tree_findings(RELEASES, root))


def on_disk(root: Path) -> dict[str, str]:
    return read(root).files


def edit_lock(root: Path, old: str, new: str) -> None:
    lock = root / "a" / "lock.json"
    text = lock.read_text(encoding="utf-8")
    assert old in text
    lock.write_text(text.replace(old, new), encoding="utf-8")


def test_equal_goldens_have_no_findings(root: Path) -> None:
    assert [found(root, release, diff=GOLDENS["a"][release].diff) for release in RELEASES] == [[], [], []]
    assert in_tree(root) == []


def test_a_diff_is_stored_once_and_named_by_the_first_release_that_has_it(root: Path) -> None:
    assert sorted(on_disk(root)) == ["a/1.11.0.diff", "a/1.9.0.diff", "a/lock.json"]
    diffs = {release: entry["diff"] for release, entry in read(root).locks["a"].items()}
    assert diffs == {"1.9.0": "1.9.0.diff", "1.10.0": "1.9.0.diff", "1.11.0": "1.11.0.diff"}


def test_a_lock_says_a_plan_once_and_a_release_in_one_line() -> None:
    lock = FILES["a/lock.json"]
    assert list(json.loads(lock)["plans"]) == ["1.9.0"]
    assert [line.split('"')[1] for line in lock.splitlines() if "patched_sha256" in line] == RELEASES
    assert dumps(loads(lock)) == lock


def test_a_target_that_nothing_changes_in_has_no_diff(root: Path) -> None:
    update("1.10.0", {"a": golden("1.10.0", "")}, ["1.10.0"], RELEASES, root)
    assert read(root).locks["a"]["1.10.0"]["diff"] is None
    assert found(root, diff="") == []
    assert in_tree(root) == []


def test_missing_lock_is_found(root: Path) -> None:
    more = {"a": golden("1.10.0"), "b": golden("1.10.0")}
    assert list(findings("1.10.0", more, root)) == ["missing: golden/b/lock.json has no TRL 1.10.0"]


def test_missing_release_is_found(root: Path) -> None:
    assert found(root, "1.12.0") == ["missing: golden/a/lock.json has no TRL 1.12.0"]


def test_missing_diff_is_found(root: Path) -> None:
    (root / "a" / "1.9.0.diff").unlink()
    assert found(root) == ["missing: golden/a/1.9.0.diff, which lock.json names for TRL 1.10.0"]
    assert in_tree(root) == ["missing: golden/a/1.9.0.diff, which lock.json names for TRL 1.9.0, 1.10.0"]


def test_orphan_release_of_a_target_is_found(root: Path) -> None:
    (finding,) = findings("1.10.0", {}, root)
    assert finding == "orphan: golden/a/lock.json has TRL 1.10.0, where that target is no patched file"


def test_unpinned_release_is_found(root: Path) -> None:
    first, *consequences = tree_findings(["1.9.0", "1.10.0"], root)
    assert first == "orphan: golden/a/lock.json has TRL 1.11.0, which golden/releases.toml does not pin"
    assert [finding.splitlines()[0].split(" is ")[0] for finding in consequences] == ["stale: golden/a/lock.json"]


@pytest.mark.parametrize("name", ["a/1.10.0.diff", "a/notes/x", "b/1.9.0.diff", "1.9.0/manifest.json"])
def test_orphan_file_is_found(root: Path, name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(DIFF, encoding="utf-8")
    assert in_tree(root) == [f"orphan: golden/{name} is named by no lock.json"]
    tidy(RELEASES, root)
    assert on_disk(root) == FILES


def test_diff_that_is_not_named_by_its_first_release_is_found(root: Path) -> None:
    (root / "a" / "1.9.0.diff").rename(root / "a" / "1.10.0.diff")
    edit_lock(root, "1.9.0.diff", "1.10.0.diff")
    (finding,) = in_tree(root)
    assert finding.startswith("stale: golden/a/lock.json is not laid out as updating does it")
    assert found(root) == []
    tidy(RELEASES, root)
    assert on_disk(root) == FILES


def test_diff_that_is_stored_twice_is_found(root: Path) -> None:
    (root / "a" / "1.10.0.diff").write_text(DIFF, encoding="utf-8")
    edit_lock(root, '"1.10.0": {"file": "trl/a.py", "diff": "1.9.0', '"1.10.0": {"file": "trl/a.py", "diff": "1.10.0')
    (finding,) = in_tree(root)
    assert finding.startswith("stale: golden/a/lock.json is not laid out as updating does it")


def test_stale_diff_is_shown_as_a_diff(root: Path) -> None:
    (finding,) = found(root, diff=OTHER)
    assert finding.startswith("stale: golden/a/1.9.0.diff, TRL 1.10.0\n")
    assert "-+new" in finding
    assert "++other" in finding


def test_stale_lock_is_shown_as_a_diff(root: Path) -> None:
    (finding,) = found(root, anchors={"p": {"a": 2}})
    assert finding.startswith("stale: golden/a/lock.json, TRL 1.10.0\n")
    assert '-  "a": 1' in finding
    assert '+  "a": 2' in finding


def test_hunk_that_only_moved_is_found(root: Path) -> None:
    (finding,) = found(root, patched_sha256="moved")
    assert finding.startswith("stale: golden/a/lock.json, TRL 1.10.0\n")
    assert "moved" in finding


def test_another_upstream_source_is_named_first(root: Path) -> None:
    first, *consequences = found(root, diff=OTHER, upstream_sha256="2222")
    assert first.startswith("upstream source is not the pinned one: trl/a.py has sha256 2222")
    assert [finding.split(":")[0] for finding in consequences] == ["stale", "stale"]


@pytest.mark.parametrize("text", ["<<<<<<< ours\n", "[]", '{"format": 1}', '{"format": 2, "releases": {"1.9.0": {}}}'])
def test_unreadable_lock_is_found(root: Path, text: str) -> None:
    (root / "a" / "lock.json").write_text(text, encoding="utf-8")
    assert [finding.split(": ")[:2] for finding in found(root)] == [["unreadable", "golden/a/lock.json"]]
    assert [finding.split(": ")[:2] for finding in in_tree(root)] == [["unreadable", "golden/a/lock.json"]]


@pytest.mark.parametrize("order", list(itertools.permutations(RELEASES)))
def test_files_do_not_depend_on_the_order_of_updating(tmp_path: Path, order: tuple[str, ...]) -> None:
    for release in order:
        update(release, {"a": GOLDENS["a"][release]}, RELEASES, RELEASES, tmp_path)
    assert on_disk(tmp_path) == FILES


def test_updating_the_first_release_alone_keeps_the_diff_of_the_others(root: Path) -> None:
    update("1.9.0", {"a": golden("1.9.0", OTHER)}, ["1.9.0"], RELEASES, root)
    assert on_disk(root).keys() == {"a/1.9.0.diff", "a/1.10.0.diff", "a/lock.json"}
    diffs = {release: entry["diff"] for release, entry in read(root).locks["a"].items()}
    assert diffs == {"1.9.0": "1.9.0.diff", "1.10.0": "1.10.0.diff", "1.11.0": "1.9.0.diff"}
    assert found(root) == []
    assert in_tree(root) == []


def test_updating_drops_targets_unpinned_releases_and_orphans(root: Path) -> None:
    (root / "old").mkdir()
    (root / "old" / "manifest.json").touch()
    update("1.10.0", {"b": golden("1.10.0")}, ["1.10.0"], ["1.9.0", "1.10.0"], root)
    assert on_disk(root).keys() == {"a/1.9.0.diff", "a/lock.json", "b/1.10.0.diff", "b/lock.json"}
    assert list(read(root).locks["a"]) == ["1.9.0"]
    assert not (root / "old").exists()
    assert (root / "releases.toml").exists()


@pytest.mark.parametrize("broken", ["a/lock.json", "a/1.9.0.diff"])
def test_updating_some_releases_refuses_to_lose_others(root: Path, broken: str) -> None:
    if broken.endswith(".json"):
        (root / broken).write_text("<<<<<<< ours\n", encoding="utf-8")
    else:
        (root / broken).unlink()
    before = on_disk(root)
    with pytest.raises(CannotUpdate, match=rf"golden/{broken} .*\n.*Update all: "):
        update("1.10.0", {"a": golden("1.10.0")}, ["1.10.0"], RELEASES, root)
    assert on_disk(root) == before
    for release in RELEASES:
        update(release, {"a": GOLDENS["a"][release]}, RELEASES, RELEASES, root)
    assert on_disk(root) == FILES


UPSTREAM = "import os\n\n\nclass T:\n    @cached\n    def f(self):\n        return old\n\n    x = 1\n"


@pytest.mark.parametrize(
    ("old", "new", "scope"),
    [
        ("old", "new", "T.f"),
        ("    @cached\n", "    @cached\n    @twice\n", "T.f"),
        ("        return", "        # before\n        return", "T.f"),
        ("x = 1", "x = 2", "T"),
        ("    x = 1\n", "    x = 1\n\n    def g(self):\n        def h(): ...\n", "T"),
        ("    x = 1\n", "    x = 1\n    def g(self):\n        def h(): ...\n", "T.g"),
        ("import os\n", "import os\nimport sys\n", "<module>"),
        ("    def f(self):\n        return old\n", "", "T.f"),
    ],
)
def test_a_hunk_names_what_its_first_change_is_in(old: str, new: str, scope: str) -> None:
    patched = UPSTREAM.replace(old, new)
    if not new:
        patched = patched.replace("    @cached\n", "")
    diff = "".join(difflib.unified_diff(UPSTREAM.splitlines(True), patched.splitlines(True), "a", "b", n=2))
    assert without_line_numbers(diff, UPSTREAM, patched).splitlines()[2] == f"@@ {scope} @@"
