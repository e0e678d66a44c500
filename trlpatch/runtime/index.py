"""Index of the cache: answers about files, recalled while the files' stats are those they were computed from.

A warm start asks what became of a megabyte of sources that did not change since the last one. As in git's index, the
stats of a file (size, mtime, ctime, inode) stand for its content, so that nothing is read and hashed. Invariants:

- An answer is recorded with stats that were taken before the files were read. A later edit changes them: ctime moves
  even where size and mtime are put back.
- Nothing is recorded about a file that changed in the last seconds: a second edit within the granularity of the file
  system's clock could leave the same stats ("racy git").
- The index decides which text is looked for, never that it may run: the loader compares its hash before.
- Whatever is wrong with an answer is as if there were none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trlpatch.runtime.cache import Cache, debug

Place = str | os.PathLike[str]

_RACY_SECONDS = 2
"""The coarsest clock of a file system in use (FAT's mtime); ext4, xfs and NFS have a few milliseconds or less."""


class Stamp(NamedTuple):
    """The stats of some files at one moment. Take it before reading them.

    Attributes:
        digest: hex SHA-256 of every file's path, size, mtime, ctime and inode.
        settled: no file changed so short a time before that another change could go unnoticed.
    """

    digest: str
    settled: bool


def stamp(files: Iterable[Place] = (), trees: Iterable[Place] = ()) -> Stamp:
    """Return the stats of `files`, which need not exist, and of every `*.py` below the folders `trees`.

    Raises:
        OSError: a folder of `trees` cannot be listed.
    """
    started = time.time_ns()
    digest, newest = hashlib.sha256(), 0
    for path in (*(os.fspath(file) for file in files), *(file for tree in trees for file in _below(tree))):
        try:
            status = os.stat(path)  # noqa: PTH116 - pathlib doubles the time
        except OSError:
            digest.update(f"{path}\0-\0".encode())
            continue
        facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        digest.update(f"{path}\0{facts}\0".encode())
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    return Stamp(digest.hexdigest(), newest < started - _RACY_SECONDS * 10**9)


def _below(tree: Place) -> Iterator[str]:
    waiting, links = [os.fspath(tree)], set()
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.endswith(".py"):
                    yield entry.path
                elif entry.name != "__pycache__" and entry.is_dir() and entry.inode() not in links:
                    waiting.append(entry.path)
                    if entry.is_symlink():  # followed once: links may lead in a circle
                        links.add(entry.inode())


class Index:
    """Answers kept below the cache directory, one file per question.

    An answer is a JSON value other than null. The question names its kind and all that decides it beside the files of
    the stamp: `index.recall(("census", str(install.root), install.version), stamp(trees=[install.root, *RULES]))`.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def recall(self, question: Iterable[str], stamp: Stamp) -> Any | None:
        """Return what was recorded for `question` when the files had these stats, or None."""
        name = _name(question)
        try:
            known = json.loads(self._cache.read_index(name))
            return known["answer"] if known["stamp"] == stamp.digest else None
        except FileNotFoundError:
            debug("index miss: %s is not there", name)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            debug("index miss: %s cannot be used: %s", name, error)
        return None

    def record(self, question: Iterable[str], stamp: Stamp, answer: Any) -> bool:
        """Keep `answer` for the next process and return whether it was kept: not where the stamp is not settled.

        Args:
            stamp: taken before the files were read.
        """
        if not stamp.settled:
            return False
        known = {"stamp": stamp.digest, "answer": answer}
        try:
            self._cache.write_index(_name(question), json.dumps(known).encode())
        except OSError:
            debug("cannot write the index", exc_info=True)
            return False
        return True


def _name(question: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(question).encode()).hexdigest()
