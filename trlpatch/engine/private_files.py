"""Private files: directories in memory for what workers in other processes, or vLLM's own loader, read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_MEMORY = Path("/dev/shm")
_PREFIX = "trlpatch-adapter-"
_LOCK = "owner.lock"


def parent() -> Path:
    """Where they are: in memory where there is /dev/shm."""
    return _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def private_directory(owner: object) -> tuple[Path, weakref.finalize[..., object]]:
    """Make a directory (mode 0700) that goes with `owner`, and the call that removes it before.

    Only the process that made it removes it: a forked child runs the same exit handlers. What a killed process has
    left is removed when the next one is made: its lock is free.
    """
    _sweep()
    made = None
    while made is None:
        made = _made()
    directory, lock = made
    return directory, weakref.finalize(owner, _remove, directory, lock, os.getpid())


def _made() -> tuple[Path, int] | None:
    """Make a directory, and lock it; None where another process has swept it away before it was locked."""
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent()))
    lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.fstat(lock).st_nlink:
        return directory, lock
    os.close(lock)
    return None


def _remove(directory: Path, lock: int, made_by: int) -> None:
    if os.getpid() == made_by:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _sweep() -> None:
    for left in parent().glob(f"{_PREFIX}*"):
        try:
            if left.lstat().st_uid != os.getuid():
                continue
            lock = os.open(left / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or in the making
            continue
        with contextlib.suppress(OSError):  # somebody holds it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
