"""golden/<target>/: one lock.json, and each distinct diff once, named by the first release that has it.

In memory a golden belongs to one target of one release. What the files are called, and which releases share one, is
decided anew by `layout` from all goldens together, whichever releases were updated and in whatever order.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.golden.sources import RELEASES_TOML, ROOT
from trlpatch.source.releases import parse_release

GOLDEN = ROOT / "golden"
FORMAT = 2
LOCK = "lock.json"
UPDATE = "python -m pytest tests/golden --golden-update"

PLAN = ("plan", "anchors", "touched", "skipped")
"""What the lock says once for all releases that have it in common."""
RELEASE = ("file", "upstream_sha256", "patched_sha256")
"""What the lock says of every release."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """One target in one release: the `RELEASE` and `PLAN` entries of the lock, and the diff, which may be empty."""

    entry: Entry
    diff: str


Goldens = dict[str, dict[str, Golden]]
"""By target, then release."""


class CannotUpdate(Exception):
    """Goldens of releases that are not being updated cannot be read, so they could not be kept."""


def layout(goldens: Goldens) -> dict[str, str]:
    """Return the files of golden/ by path: equal diffs are one file, named by the oldest release that has it."""
    files = {}
    for target, releases in goldens.items():
        entries: dict[str, Entry] = {}
        since: dict[str, str] = {}
        for release in sorted(releases, key=parse_release):
            golden = releases[release]
            name = f"{since.setdefault(golden.diff, release)}.diff" if golden.diff else None
            entries[release] = {**golden.entry, "diff": name}
            if name:
                files[f"{target}/{name}"] = golden.diff
        if entries:
            files[f"{target}/{LOCK}"] = dumps(entries)
    return files


def dumps(entries: dict[str, Entry]) -> str:
    """Return the text of a lock: a plan once, with one line per field; a release in one line, naming its plan.

    Hashes change with every edit of a patch. They stand in lines that follow each other, so that git shows one hunk.
    """
    plans: dict[str, str] = {}
    since: dict[str, str] = {}
    lines = []
    for release, entry in entries.items():
        plan = ",\n".join(f"   {json.dumps(key)}: {json.dumps(entry[key])}" for key in PLAN)
        name = since.setdefault(plan, release)
        plans[name] = plan
        file, *hashes = RELEASE
        line = {file: entry[file], "diff": entry["diff"], "plan": name, **{key: entry[key] for key in hashes}}
        lines.append(f"  {json.dumps(release)}: {json.dumps(line)}")
    blocks = ",\n".join(f"  {json.dumps(name)}: {{\n{plan}\n  }}" for name, plan in plans.items())
    releases = ",\n".join(lines)
    return f'{{\n "format": {FORMAT},\n "plans": {{\n{blocks}\n }},\n "releases": {{\n{releases}\n }}\n}}\n'


def loads(text: str) -> dict[str, Entry]:
    """Return the entries of a lock by release, each with all of `RELEASE`, `PLAN` and `diff`.

    Raises:
        ValueError: `text` is no lock of this format.
    """
    try:
        lock = json.loads(text)
        if lock["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {lock['format']!r}")
        return {
            release: {
                **{key: line[key] for key in (*RELEASE, "diff")},
                **{key: lock["plans"][line["plan"]][key] for key in PLAN},
            }
            for release, line in lock["releases"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass
class Tree:
    """What golden/ holds.

    Attributes:
        files: the text of every file in a folder of golden/, by path.
        locks: the entries of every lock that can be read, by target, then release.
        unreadable: target -> why its lock cannot be read.
    """

    files: dict[str, str]
    locks: dict[str, dict[str, Entry]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def diff(self, target: str, release: str) -> str | None:
        """Return the diff that the lock names, empty if it names none; None if that file is missing."""
        name = self.locks[target][release]["diff"]
        return self.files.get(f"{target}/{name}") if name else ""

    def goldens(self, releases: Collection[str]) -> Goldens:
        """Return the goldens of `releases`, less those whose lock cannot be read or whose diff is missing."""
        found: Goldens = {}
        for target, entries in self.locks.items():
            for release in releases & entries.keys():
                if (diff := self.diff(target, release)) is not None:
                    entry = {key: value for key, value in entries[release].items() if key != "diff"}
                    found.setdefault(target, {})[release] = Golden(entry, diff)
        return found

    def missing(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the diffs that locks name and that are not there, with the releases they are named for."""
        for target, entries in self.locks.items():
            absent: dict[str, list[str]] = {}
            for release, entry in entries.items():
                if self.diff(target, release) is None:
                    absent.setdefault(f"{target}/{entry['diff']}", []).append(release)
            yield from absent.items()


def read(root: Path = GOLDEN) -> Tree:
    """Read golden/; a lock that cannot be read is noted, not raised."""
    paths = [path for path in sorted(root.glob("*/**/*")) if path.is_file()]
    tree = Tree(
        {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in paths}
    )
    for name, text in tree.files.items():
        target, _, file = name.partition("/")
        if file == LOCK:
            try:
                tree.locks[target] = loads(text)
            except ValueError as error:
                tree.unreadable[target] = str(error)
    return tree


def write(files: dict[str, str], root: Path = GOLDEN) -> None:
    """Make the folders of golden/ hold exactly `files`."""
    for name, text in read(root).files.items():
        if name not in files:
            (root / name).unlink()
        elif files[name] == text:
            files = {other: content for other, content in files.items() if other != name}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", newline="\n")
    for folder in sorted((path for path in root.glob("**/*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def update(
    version: str, rendered: dict[str, Golden], updating: Collection[str], pinned: Collection[str], root: Path = GOLDEN
) -> None:
    """Put `rendered` in the place of what golden/ has of `version`, and drop what is of no pinned release.

    Args:
        updating: the releases that this and the following calls update. Only of these may goldens be lost now.

    Raises:
        CannotUpdate: something that is to be kept cannot be read.
    """
    tree = read(root)
    if kept := set(pinned) - set(updating):
        lost = [f"golden/{target}/{LOCK} cannot be read: {why}" for target, why in tree.unreadable.items()]
        lost += [f"golden/{name} is missing" for name, releases in tree.missing() if kept & set(releases)]
        if lost:
            lost.append(f"Releases that are not updated would lose their goldens. Update all: {UPDATE}")
            raise CannotUpdate("\n".join(lost))
    goldens = tree.goldens(set(pinned) - {version})
    for target, golden in rendered.items():
        goldens.setdefault(target, {})[version] = golden
    write(layout(goldens), root)


def tidy(pinned: Collection[str], root: Path = GOLDEN) -> None:
    """Drop what belongs to no pinned release, and name diffs by the first release that has them."""
    tree = read(root)
    if not tree.unreadable and not any(tree.missing()):
        write(layout(tree.goldens(set(pinned))), root)


@contextmanager
def exclusive() -> Iterator[None]:
    """Keep the other processes of a test run out while golden/ is read or written."""
    with RELEASES_TOML.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
