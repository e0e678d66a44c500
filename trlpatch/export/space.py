"""Disk and memory before an export: what it will take, and whether that is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trlpatch.errors import CannotExport

SPARE = 64 << 20
"""Bytes of the disk that are left to others."""


def need_disk(folder: Path, size: int, what: str) -> None:
    """Check that `size` bytes fit on the disk of a folder that exists.

    Raises:
        CannotExport: they do not.
    """
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise CannotExport(
            f"writing {what} to {str(folder)!r}: expected {gib(size + SPARE)} free on that disk, found {gib(free)}; "
            "write to another disk, or fewer or smaller types"
        )


def free_memory() -> int:
    """Return the bytes that this process can still take: of the machine, and of its container's limit."""
    free = _meminfo()
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, taken = _number(Path(limit)), _number(Path(used))
        if most is not None and taken is not None:
            free = min(free, max(0, most - taken))
    return free


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def gib(size: float) -> str:
    """Write a number of bytes for people."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
