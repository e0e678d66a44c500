"""A scratch folder beside the target: what is written appears there first, and by rename when it is whole.

It is removed whatever happens. What a killed process left is removed by the next export into the same folder, and an
earlier export that it had moved aside goes back to its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trlpatch.errors import CannotExport

_PREFIX = ".trlpatch-export-"
ASIDE = "earlier"
"""Folder in a scratch folder for what is replaced, under its own name."""

_OF_THE_PLACE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC,
    errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
}  # fmt: skip


@contextlib.contextmanager
def refusing(target: Path) -> Iterator[None]:
    """Tell what the system refuses (no space, no permission, ...) as what cannot be exported to `target`.

    Raises:
        CannotExport: in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        raise CannotExport(f"writing {str(target)!r}: {error}; nothing was left of it; write elsewhere") from error


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield a new folder inside `beside`, on its disk, so that a rename out of it is atomic.

    Raises:
        CannotExport: the system refuses to write there.
    """
    host = re.sub(r"\W", "_", socket.gethostname())
    with refusing(beside):
        for left in beside.glob(f"{_PREFIX}{host}-*"):
            owner = left.name.removeprefix(f"{_PREFIX}{host}-").split("-")[0]
            if owner.isdigit() and not _alive(int(owner)):
                _clear(left)
        with tempfile.TemporaryDirectory(
            prefix=f"{_PREFIX}{host}-{os.getpid()}-", dir=beside, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _clear(left: Path) -> None:
    """Remove the scratch folder of a killed process, which may have died between two renames."""
    for earlier in left.glob(f"{ASIDE}/*"):
        target = left.parent / earlier.name
        if not target.exists():
            earlier.rename(target)
    shutil.rmtree(left, ignore_errors=True)
