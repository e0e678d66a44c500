"""Dump of the text that runs (`TRLPATCH_DUMP`), for reading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trlpatch.runtime.cache import publish
from trlpatch.runtime.prepare import PatchedTarget


def dump(directory: Path, version: str, patched: Iterable[PatchedTarget]) -> None:
    """Write what runs to `directory/<version>/trl/...`.

    Raises:
        OSError: it cannot be written.
    """
    for one in patched:
        path = directory / version / one.source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, one.text.encode())
