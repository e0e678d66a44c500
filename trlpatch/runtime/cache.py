"""Cache of patched files on disk, addressed by everything that decides their text.

Invariants:
- The same key means the same bytes, so processes that race need no lock: the last rename wins with equal content.
- A manifest appears only after the file it describes, and both appear by rename, never half written.
- The text is compared with the manifest's hash before it may run; whatever is wrong with an entry is a miss.
- Code runs from here, so a directory that somebody else owns or may write to is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trlpatch.options import CACHE_DIR, read_directory

FORMAT = "v1"
"""Name of the layout below the root. Change it when an older trlpatch could not read an entry, or the reverse."""

MANIFEST = "manifest.json"

REJECTED = "rejected"
"""Name of the folder below the root for text that failed an output check. It is read by people and never run."""

INDEX = "index"
"""Name of the folder below the root for `trlpatch.runtime.index`."""

_KEY = r"[0-9a-f]{64}"
_PACKAGE = Path(__file__).resolve().parent.parent

RULES = ("outcomes.py", "trl_names.py", "rewrite", "source")
"""The files and folders of the package that decide patched text.

Of what the rewriter imports, `trlpatch.errors` alone is not among them: it decides messages.
"""


def debug(message: str, *args: object, **named: Any) -> None:
    """Log why an entry was not used or not written; logging takes a fifth of a warm start to import."""
    import logging

    logging.getLogger("trlpatch.cache").debug(message, *args, **named)


@dataclass(frozen=True)
class Stored:
    """One readable entry.

    Attributes:
        path: the patched file; it exists and holds `text`.
        manifest: what `Cache.write` was given, with the hashes added.
    """

    path: Path
    text: str
    manifest: Mapping[str, Any]


class CacheRefused(OSError):
    """The directory is not safe to run code from."""


def root() -> Path:
    """Return the cache directory: `TRLPATCH_CACHE_DIR`, else the user's cache directory. Creates nothing."""
    override = read_directory(CACHE_DIR)
    if override is not None:
        return override.absolute()
    platform: str = sys.platform
    if platform == "linux":
        # What platformdirs answers, without the 15 ms that importing it adds to every warm start.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "trlpatch"
    return _platform_root()


def _platform_root() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("trlpatch", appauthor=False)


def path() -> Path:
    """Return the cache directory, as `trlpatch cache path` prints it."""
    return root()


def clear() -> int:
    """Delete every entry of the cache directory and return how many there were.

    Raises:
        OSError: one of them cannot be deleted.
    """
    return Cache().clear()


def size() -> int:
    """Return the bytes that the entries of the cache directory take."""
    return Cache().size()


def entry_key(
    *,
    target: str,
    release: Iterable[int],
    upstream_sha256: str,
    skip: Iterable[str],
    rules: str,
    asked_for: Iterable[str] = (),
) -> str:
    """Return the key of one patched file. `rules` is what `rules_digest` returns."""
    parts = [FORMAT, target, ".".join(map(str, release)), upstream_sha256]
    parts += [",".join(sorted(skip)), ",".join(sorted(asked_for)), rules]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def rules_digest() -> str:
    """Return a digest of all that turns upstream text into patched text, computed without importing any of it.

    Covers all that `trlpatch.rewrite` is made of and imports, the version of trlpatch and that of libcst.
    """
    digest = hashlib.sha256(f"{_version('trlpatch')}\0{_version('libcst')}".encode())
    for name in _rules():
        digest.update(f"\0{name}\0".encode())
        with open(f"{_PACKAGE}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - pathlib doubles the time
            digest.update(file.read())
    return digest.hexdigest()


def _rules() -> Iterator[str]:
    """Yield the sources in RULES, relative to the package."""
    for name in RULES:
        yield from [name] if name.endswith(".py") else _modules_in(name)


def _modules_in(folder: str) -> Iterator[str]:
    for entry in sorted(os.scandir(_PACKAGE / folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _modules_in(f"{folder}/{entry.name}")
        elif entry.name.endswith(".py"):
            yield f"{folder}/{entry.name}"


def _version(distribution: str) -> str:
    # The name of the dist-info directory holds the version; importlib.metadata costs 30 ms to import.
    for place in sys.path:
        try:
            names = sorted(entry.name for entry in os.scandir(place or "."))
        except OSError:
            continue
        for name in names:
            if name.startswith(f"{distribution}-") and name.endswith(".dist-info"):
                return name
    return f"{distribution} without metadata"


class Cache:
    """Entries below one root directory."""

    def __init__(self, directory: Path | None = None) -> None:
        self.root = root() if directory is None else directory

    def entry(self, key: str) -> Path:
        """Return the directory of `key`, which need not exist."""
        return self.root / FORMAT / key

    def read(self, key: str, basename: str) -> Stored | None:
        """Return the entry, or None with a debug log line if it is missing or anything is wrong with it."""
        directory = self.entry(key)
        try:
            for place in (self.root, directory.parent, directory):
                _refuse_unsafe(place)
            manifest = json.loads(_read_own(directory / MANIFEST))
            content = _read_own(directory / basename)
            if manifest["format"] != FORMAT or manifest["key"] != key:
                raise ValueError("the manifest belongs to another entry")
            if manifest["patched_sha256"] != hashlib.sha256(content).hexdigest():
                raise ValueError("the file is not the one its manifest describes")
            return Stored(directory / basename, content.decode(), manifest)
        except FileNotFoundError:
            debug("cache miss: %s is not there", directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            debug("cache miss: %s cannot be used: %s", directory, error)
        return None

    def write(self, key: str, basename: str, text: str, manifest: Mapping[str, Any]) -> Path:
        """Publish an entry and return the path of its file.

        Raises:
            OSError: the directory is read-only, full or not safe to run code from; nothing half written is left.
        """
        directory = self.entry(key)
        self._make(directory)
        content = text.encode()
        described = {
            **manifest,
            "format": FORMAT,
            "key": key,
            "patched_sha256": hashlib.sha256(content).hexdigest(),
        }
        publish(directory / basename, content)
        publish(directory / MANIFEST, json.dumps(described, indent=1, sort_keys=True).encode())
        return directory / basename

    def keep_rejected(self, key: str, basename: str, text: str) -> Path | None:
        """Keep text that failed an output check, for reading, and return its path.

        Below the cache directory, else in a temporary one; None where neither can be written.
        """
        directory = self.root / REJECTED / key
        try:
            self._make(directory)
            publish(directory / basename, text.encode())
        except OSError:
            debug("cannot write %s", directory, exc_info=True)
            return _temporary(basename, text)
        return directory / basename

    def read_index(self, name: str) -> bytes:
        """Return an answer of the index as it was written.

        Raises:
            OSError: it is not there, or somebody else could have written it.
        """
        directory = self.root / INDEX
        for place in (self.root, directory):
            _refuse_unsafe(place)
        return _read_own(directory / name)

    def write_index(self, name: str, content: bytes) -> None:
        """Publish an answer of the index.

        Raises:
            OSError: the directory is read-only, full or not safe to run code from; nothing half written is left.
        """
        self._make(self.root / INDEX)
        publish(self.root / INDEX / name, content)

    def _make(self, directory: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in dict.fromkeys((self.root, directory.parent, directory)):
            place.mkdir(exist_ok=True, mode=0o700)
            _refuse_unsafe(place)

    def clear(self) -> int:
        """Delete every entry and return how many there were. Touches nothing that is not an entry.

        Raises:
            OSError: one of them cannot be deleted.
        """
        import shutil  # here and in publish: 12 ms that a warm start does not need

        entries = list(self._entries())
        for directory in entries:
            shutil.rmtree(directory)
        return len(entries)

    def size(self) -> int:
        """Return the bytes that the entries take."""
        files = (file for directory in self._entries() for file in directory.rglob("*"))
        return sum(file.lstat().st_size for file in files if not file.is_dir())

    def _entries(self) -> Iterator[Path]:
        versions = [place for place in (self.root / FORMAT, self.root / REJECTED) if place.is_dir()]
        for child in (child for place in versions for child in sorted(place.iterdir())):
            if re.fullmatch(_KEY, child.name) and child.is_dir() and not child.is_symlink():
                yield child


def publish(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step, through a temporary file in the same directory.

    Raises:
        OSError: it could not be written; the temporary file is gone.
    """
    import tempfile

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _temporary(basename: str, text: str) -> Path | None:
    import tempfile

    try:
        # The last choice of tempfile, where no temporary directory can be written, is the working directory.
        if Path(tempfile.gettempdir()) == Path.cwd():
            return None
        path = Path(tempfile.mkdtemp(prefix="trlpatch-rejected-")) / basename
        publish(path, text.encode())
    except OSError:
        debug("cannot write a temporary file", exc_info=True)
        return None
    return path


def _refuse_unsafe(directory: Path) -> None:
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise CacheRefused(f"{directory} is not a directory")
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise CacheRefused(f"{directory} belongs to user {status.st_uid}, expected {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise CacheRefused(f"{directory} may be written by others (mode {mode:04o}); run: chmod 700 {directory}")


def _read_own(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CacheRefused(f"{path} is not a regular file")
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            raise CacheRefused(f"{path} belongs to user {status.st_uid}, expected {os.geteuid()}")
        return file.read()
