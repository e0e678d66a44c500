"""Write sharded safetensors a block at a time, into a directory that takes its name when all is there.

`safetensors.torch.save_file` holds every tensor of a shard at once, and 5 GB is a usual shard. The format is a header
of JSON and the bytes of the tensors one after the other: it is written here as the tensors come.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.export.scratch import ASIDE, refusing, scratch_folder
from trlpatch.export.source import ExportTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REPORT = "trlpatch_export.json"
"""What an export was made from; also what tells that files are those of an earlier export."""
_SLACK = 64 << 20
"""Bytes for configs, a tokenizer and file system blocks."""
_KINDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@contextlib.contextmanager
def new_directory(target: Path, *, overwrite: bool, size: int, inputs: Collection[Path] = ()) -> Iterator[Path]:
    """A directory on the disk of `target` to write into, which replaces it at the end; after an error nothing is left.

    Args:
        target: the directory that is to be there at the end; a link to one stays a link.
        overwrite: replace a directory whatever is in it. One that holds nothing but an earlier export needs none.
        size: bytes that will be written.
        inputs: directories that the export is made from, or that an adapter belongs to; they are never replaced.

    Raises:
        CannotExport: `target` is a file, one of `inputs` or around one, or holds something else than an export; the
            disk has no room; or the system refuses to write there.
    """
    with refusing(target):
        target = target.expanduser().resolve()
        _require_replaceable(target, overwrite=overwrite, inputs=inputs)
        parent = target.parent
        made = [one for one in (parent, *parent.parents) if not one.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _require_room(target, size)
            with scratch_folder(parent) as scratch:
                place = scratch / "export"
                place.mkdir()
                yield place
                _require_replaceable(target, overwrite=overwrite, inputs=inputs)  # it may have come meanwhile
                _replace(target, place, scratch / ASIDE)
        except BaseException:
            for one in made:
                with contextlib.suppress(OSError):
                    one.rmdir()
            raise


def write_report(place: Path, report: dict[str, Any]) -> tuple[str, ...]:
    """Write what the export was made from and which files are its own; the names of these."""
    files = tuple(sorted({REPORT, *(one.name for one in place.iterdir())}))
    (place / REPORT).write_text(json.dumps({**report, "files": files}, indent=2) + "\n", encoding="utf-8")
    return files


def _others(target: Path) -> list[str]:
    """What of a directory is not of an earlier export."""
    try:
        own = json.loads((target / REPORT).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        own = ()
    return sorted(one.name for one in target.iterdir() if one.name not in own)


def _require_replaceable(target: Path, *, overwrite: bool, inputs: Collection[Path]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CannotExport(f"writing {str(target)!r}: expected a directory or nothing there, found a file")
    here = Path.cwd()
    if target in (here, *here.parents):
        raise CannotExport(
            f"writing {str(target)!r}: the current directory is in it, and would be replaced; nothing was written; "
            "choose a directory in it"
        )
    for one in inputs:
        place = one.expanduser().resolve()
        if place.is_dir() and target in (place, *place.parents):
            raise CannotExport(
                f"writing {str(target)!r}: the export is made from {str(one)!r}, which would be removed, and adapters "
                "that belong to it would be lost; nothing was written; choose another directory"
            )
    others = [] if overwrite else _others(target)
    if others:
        raise CannotExport(
            f"writing {str(target)!r}: it holds {others[0]!r}, which is not of an earlier export; nothing was "
            "written; choose another directory, or pass overwrite=True (--overwrite), which removes all that is in it"
        )


def _require_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size + _SLACK:
        raise CannotExport(
            f"writing {str(target)!r}: {size + _SLACK:,} bytes are needed and {free:,} are free there; choose another "
            "disk, or a smaller dtype; an earlier export in the same place is replaced at the end only"
        )


def _replace(target: Path, place: Path, aside: Path) -> None:
    """Both renames are within one disk; between them the earlier export is in `aside`."""
    if not target.exists():
        place.rename(target)
        return
    aside.mkdir()
    earlier = aside / target.name
    target.rename(earlier)
    try:
        place.rename(target)
    except BaseException:
        earlier.rename(target)
        raise


@dataclass(frozen=True)
class Shard:
    """One file."""

    name: str
    tensors: tuple[ExportTensor, ...]


def plan_shards(tensors: Sequence[ExportTensor], dtype: torch.dtype, limit: int) -> list[Shard]:
    """Tensors in their order, in files of at most `limit` bytes each (a larger tensor has one to itself)."""
    groups: list[list[ExportTensor]] = [[]]
    filled = 0
    for one in tensors:
        size = one.elements * one.dtype_in(dtype).itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(one)
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


Watch = Callable[[ExportTensor, "Tensor | None"], Any]
"""Called for every tensor before it is written, with its float32 value where an adapter changes it."""


def write_shards(
    shards: Sequence[Shard], directory: Path, dtype: torch.dtype, *, watch: Watch, progress: Callable[[int], Any]
) -> int:
    """Write the shards and their index; the bytes of all tensors.

    `progress` is called with the bytes of every tensor that was written.
    """
    total = 0
    for shard in shards:
        total += _write(shard, directory / shard.name, dtype, watch, progress)
    if len(shards) > 1:
        names = {one.name: shard.name for shard in shards for one in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write(shard: Shard, path: Path, dtype: torch.dtype, watch: Watch, progress: Callable[[int], Any]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in shard.tensors:
        stored = one.dtype_in(dtype)
        start, end = end, end + one.elements * stored.itemsize
        kind = _KINDS[str(stored).removeprefix("torch.")]
        header[one.name] = {"dtype": kind, "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for one in shard.tensors:
            written = 0
            if one.adapted:
                value = one.read()
                watch(one, value)
                written += _append(file, value.to(one.dtype_in(dtype)))
                del value
            else:
                watch(one, None)
                for block in one.blocks(dtype):
                    _require_fits(one, block)
                    written += _append(file, block)
            expected = one.elements * one.dtype_in(dtype).itemsize
            if written != expected:
                raise CannotExport(f"writing {one.name!r}: expected {expected} bytes, found {written}")
            progress(written)
        file.flush()
        os.fsync(file.fileno())
    return end


def _require_fits(one: ExportTensor, block: Tensor) -> None:
    """float16 ends at 65504, and bfloat16 does not."""
    import torch

    if block.dtype == torch.float16 and one.base.dtype != torch.float16 and not bool(torch.isfinite(block).all()):
        raise CannotExport(
            f"writing {one.name!r} in float16: it holds values beyond 65504 (or that are not finite in the base); use "
            "--dtype bfloat16"
        )


def _append(file: Any, tensor: Tensor) -> int:
    import torch

    count: int = file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return count
