"""A scratch folder beside the target: files appear there first, and by rename when they are whole.

It is removed whatever happens. What a killed process left is removed by the next export into the same folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".trlpatch-gguf-"


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield a new folder inside `beside`, on its disk, so that a rename out of it is atomic."""
    host = re.sub(r"\W", "_", socket.gethostname())
    for left in beside.glob(f"{_PREFIX}{host}-*"):
        owner = left.name.removeprefix(f"{_PREFIX}{host}-").split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{_PREFIX}{host}-{os.getpid()}-", dir=beside, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
