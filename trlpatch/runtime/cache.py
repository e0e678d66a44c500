"""Cache of patched files on disk, addressed by everything that decides their text.

Invariants:
- The same key means the same bytes, so processes that race need no lock: the last rename wins with equal content.
- A manifest appears only after the file it describes, and both appear by rename, never half written.
- The text is compared with the manifest's hash before it may run; whatever is wrong with an entry is a miss.
- Code runs from here, so a directory that somebody else owns or may write to is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trlpatch.errors import TrlpatchError
from trlpatch.options import CACHE_DIR, read_directory

FORMAT = "v1"
"""Name of the layout below the root. Change it when an older trlpatch could not read an entry, or the reverse."""

MANIFEST = "manifest.json"

REJECTED = "rejected"
"""Name of the folder below the root for text that failed an output check. It is read by people and never run."""

INDEX = "index"
"""Name of the folder below the root for `trlpatch.runtime.index`."""

_KEY = r"[0-9a-f]{64}"


def debug(message: str, *args: object, **named: Any) -> None:
    """Log why an entry was not used or not written; logging takes a fifth of a warm start to import."""
    import logging

    logging.getLogger("trlpatch.cache").debug(message, *args, **named)


class Stored(NamedTuple):
    """One readable entry.

    Attributes:
        path: the patched file; it exists and holds `text`.
        manifest: what `Cache.write` was given, with the hashes added.
    """

    path: Path
    text: str
    manifest: Mapping[str, Any]


class CacheRefused(TrlpatchError, OSError):
    """The directory is not safe to run code from."""


def root() -> Path:
    """Return the cache directory: `TRLPATCH_CACHE_DIR`, else the user's cache directory. Creates nothing.

    Raises:
        InvalidOption: TRLPATCH_CACHE_DIR begins with a home directory that cannot be determined.
        CacheRefused: there is no home directory: HOME is not set, and the user has no entry in the user database.
    """
    override = read_directory(CACHE_DIR)
    if override is not None:
        return override.absolute()
    platform: str = sys.platform
    if platform == "linux":
        # What platformdirs answers, without the 15 ms that importing it adds to every warm start.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else _home() / ".cache") / "trlpatch"
    return _platform_root()


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        # A container run as any user, such as on OpenShift.
        raise CacheRefused(
            f"the home directory of user {os.geteuid()} cannot be determined: HOME is not set, and the user database "
            f"does not know this user ({CACHE_DIR} names another directory)"
        ) from error


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


class Cache:
    """Entries below one root directory; where there is none, nothing can be read or written."""

    def __init__(self, directory: Path | None = None) -> None:
        self._refused: CacheRefused | None = None
        try:
            self.root = root() if directory is None else directory
        except CacheRefused as error:
            self.root, self._refused = Path(os.devnull, "trlpatch"), error

    def entry(self, key: str) -> Path:
        """Return the directory of `key`, which need not exist."""
        return self.root / FORMAT / key

    def read(self, key: str, basename: str) -> Stored | None:
        """Return the entry, or None with a debug log line if it is missing or anything is wrong with it."""
        directory = self.entry(key)
        try:
            self._refuse_unsafe(directory)
            manifest = json.loads(_read_own(directory / MANIFEST))
            if manifest["format"] != FORMAT or manifest["key"] != key:
                raise ValueError("the manifest belongs to another entry")
            return Stored(directory / basename, self.text(key, basename, manifest["patched_sha256"]), manifest)
        except FileNotFoundError:
            debug("cache miss: %s is not there", directory)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            debug("cache miss: %s cannot be used: %s", directory, error)
        return None

    def text(self, key: str, basename: str, sha256: str) -> str:
        """Return the text of an entry that its manifest describes with `sha256`.

        Raises:
            OSError: it is not there, or somebody else could have written it.
            ValueError: it is another text.
        """
        self._refuse_unsafe(self.entry(key))
        content = _read_own(self.entry(key) / basename)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("the file is not the one its manifest describes")
        return content.decode()

    def write(self, key: str, basename: str, text: str, manifest: Mapping[str, Any]) -> Path:
        """Publish an entry and return the path of its file.

        Raises:
            OSError: the directory is read-only, full or not safe to run code from; nothing half written is left.
        """
        directory = self.entry(key)
        content = text.encode()
        described = {
            **manifest,
            "format": FORMAT,
            "key": key,
            "patched_sha256": hashlib.sha256(content).hexdigest(),
        }
        manifest_text = json.dumps(described, indent=1, sort_keys=True)
        self._publish(directory, {basename: content, MANIFEST: manifest_text.encode()})
        return directory / basename

    def keep_rejected(self, key: str, basename: str, text: str) -> Path | None:
        """Keep text that failed an output check, for reading, and return its path.

        Below the cache directory, else in a temporary one; None where neither can be written.
        """
        directory = self.root / REJECTED / key
        try:
            self._publish(directory, {basename: text.encode()})
        except OSError:
            debug("cannot write %s", directory, exc_info=True)
            return _temporary(basename, text)
        return directory / basename

    def read_index(self, name: str) -> bytes:
        """Return an answer of the index as it was written.

        Raises:
            OSError: it is not there, or somebody else could have written it.
        """
        self._refuse_unsafe(self.root / INDEX)
        return _read_own(self.root / INDEX / name)

    def write_index(self, name: str, content: bytes) -> None:
        """Publish an answer of the index.

        Raises:
            OSError: the directory is read-only, full or not safe to run code from; nothing half written is left.
        """
        self._publish(self.root / INDEX, {name: content})

    def _publish(self, directory: Path, contents: Mapping[str, bytes]) -> None:
        """Publish files in this order; again where `clear` of another process takes the directory away meanwhile."""
        for last in (*[False] * 9, True):
            try:
                self._make(directory)
                for name, content in contents.items():
                    publish(directory / name, content)
                return
            except (FileNotFoundError, FileExistsError):  # Path.mkdir raises both in that race
                if last:
                    raise

    def _make(self, directory: Path) -> None:
        if self._refused is not None:
            raise self._refused
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in self._from_root(directory):
            place.mkdir(exist_ok=True, mode=0o700)
            _refuse_unsafe(place)

    def _refuse_unsafe(self, directory: Path) -> None:
        if self._refused is not None:
            raise self._refused
        for place in self._from_root(directory):
            _refuse_unsafe(place)

    def _from_root(self, directory: Path) -> list[Path]:
        return [self.root, *reversed([place for place in directory.parents if self.root in place.parents]), directory]

    def clear(self) -> int:
        """Delete every entry and the index, and return how many entries there were. Touches nothing else.

        Other processes may be writing: what is gone by itself is no error, and an entry that is being written stays.

        Raises:
            OSError: one of them cannot be deleted.
        """
        for answer in self._children(INDEX):
            answer.unlink(missing_ok=True)
        return sum(_deleted(entry) for entry in self._entries())

    def size(self) -> int:
        """Return the bytes that the entries and the index take."""
        return sum(_size(place) for place in (*self._entries(), *self._children(INDEX)))

    def _entries(self) -> Iterator[Path]:
        for child in (*self._children(FORMAT), *self._children(REJECTED)):
            if child.is_dir() and not child.is_symlink():
                yield child

    def _children(self, folder: str) -> list[Path]:
        """Return what is called like a key below `folder` of the root."""
        if self._refused is not None:
            return []
        try:
            return [child for child in sorted((self.root / folder).iterdir()) if re.fullmatch(_KEY, child.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []


def _deleted(entry: Path) -> bool:
    """Delete an entry; False where another process did, or is writing into it."""
    import shutil  # here and in publish: 12 ms that a warm start does not need

    try:
        shutil.rmtree(entry)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _size(path: Path) -> int:
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            return sum(map(_size, path.iterdir()))
        return path.lstat().st_size
    except FileNotFoundError:  # deleted by another process
        return 0


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
    # Not blocking: opening a FIFO for reading would wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CacheRefused(f"{path} is not a regular file")
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            raise CacheRefused(f"{path} belongs to user {status.st_uid}, expected {os.geteuid()}")
        return file.read()
