"""Export merged weights: a checkpoint that transformers, vLLM and converters load without PEFT."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.export.source import ExportSource, ExportTensor
from trlpatch.export.space import free_memory
from trlpatch.export.survival import Survival, require_finite, sample
from trlpatch.export.verify import verify_export
from trlpatch.export.writer import new_directory, plan_shards, write_report, write_shards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("bfloat16", "float16", "float32")
Progress = Callable[[str, int, int], Any]
"""Called with (what is done now, bytes that are done, bytes in all)."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    dtype: str
    bytes: int
    """Of the weights."""
    seconds: float
    files: tuple[str, ...]
    survival: Survival | None = field(repr=False)
    """None for a model without an adapter."""
    verified: str
    """What was compared, as a sentence."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.directory}: {size_of(self.bytes)} ({self.dtype}) in {self.seconds:.1f} s"]
        return "\n".join([*lines, f"compared: {self.verified}", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "directory": str(self.directory), "dtype": self.dtype, "bytes": self.bytes,
            "seconds": round(self.seconds, 3), "files": list(self.files), "verified": self.verified,
            "lost": None if self.survival is None else self.survival.lost(), "notes": list(self.notes),
        }  # fmt: skip

    @property
    def lossy(self) -> bool:
        """Is a twentieth of what the adapter does to the weights lost in the dtype, or more?"""
        lost = None if self.survival is None else self.survival.lost()
        return lost is not None and lost >= 0.05


@dataclass(frozen=True)
class Estimate:
    """What an export will take."""

    bytes: int
    """On disk."""
    working: int
    """Bytes of memory beside what the process has: float32 copies of a tensor, and blocks."""
    shards: int


def size_of(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def default_dtype(source: ExportSource) -> torch.dtype:
    """The base's dtype where that has 16 bits, else bfloat16."""
    import torch

    return source.dtype if source.dtype.itemsize == 2 else torch.bfloat16


def dtype_of(name: Any, source: ExportSource) -> torch.dtype:
    """The dtype of an export: None, a torch dtype, or its name.

    Raises:
        CannotExport: it is none of DTYPES.
    """
    return default_dtype(source) if name is None else dtype_named(name)


def dtype_named(name: Any) -> torch.dtype:
    """One of DTYPES.

    Raises:
        CannotExport: it is another.
    """
    import torch

    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise CannotExport(f"dtype={name!r}: expected {', '.join(DTYPES)} or None, which is the base model's")
    found: torch.dtype = getattr(torch, text)
    return found


def shard_limit(size: int | str) -> int:
    """Bytes of "5GB", "500MB", 1000, ...

    Raises:
        CannotExport: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise CannotExport(f"max_shard_size={size!r}: expected bytes or a size such as '5GB' or '500MB'")
    return int(float(match[1]) * unit)


def estimate(source: ExportSource, dtype: torch.dtype, *, max_shard_size: int | str = "5GB") -> Estimate:
    """What `write_merged` will take."""
    shards = plan_shards(source.tensors, dtype, shard_limit(max_shard_size))
    return Estimate(source.size(dtype), source.largest(), len(shards))


def write_merged(
    source: ExportSource,
    directory: str | Path,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool | str = True,
    progress: Progress | None = None,
) -> Exported:
    """Write config, tokenizer and merged weights into a directory that is complete or not there.

    Args:
        source: of `open_source`.
        directory: is made; an earlier export in it is replaced at the end, anything else needs `overwrite`.
        dtype: "bfloat16", "float16" or "float32"; None is the base's 16-bit one. The sum is rounded once.
        max_shard_size: bytes of a file, or "5GB".
        overwrite: replace the directory whatever is in it.
        verify: compare what was written before it takes its name: every tensor, and for models of up to 1 GiB in
            float32 the log-probabilities of a prompt as well ("logps": of a model of any size; False: nothing).
        progress: is told how far it is.

    Raises:
        CannotExport: no room, a directory that is not to be replaced, values that do not fit, or an adapter that PEFT
            cannot merge. Nothing is left.
        ExportMismatch: what was written differs from what was to be written. Nothing is left.
    """
    started = time.monotonic()
    stored = dtype_of(dtype, source)
    if verify not in (True, False, "logps"):
        raise CannotExport(f"verify={verify!r}: expected True, False or 'logps'")
    shards = plan_shards(source.tensors, stored, shard_limit(max_shard_size))
    total = source.size(stored)
    _require_memory(source)
    survival = Survival(stored) if source.adapter is not None else None
    target = Path(directory).expanduser()
    tell = progress or (lambda what, done, of: None)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        tell("writing", done, total)

    with new_directory(target, overwrite=overwrite, size=total, inputs=source.inputs) as place:
        source.save_settings(place, dtype=stored)
        tell("writing", 0, total)
        size = write_shards(shards, place, stored, watch=_watch(survival, stored), progress=wrote)
        verified = "not compared"
        if verify:
            verified = verify_export(source, place, stored, logps=verify == "logps" or None, progress=tell)
        seconds = time.monotonic() - started
        notes = source.notes if survival is None else (*source.notes, survival.sentence())
        report: dict[str, Any] = {
            "what": "merged weights", "of": source.where, "base": source.base_name, "adapter": source.adapter,
            "kinds": source.kinds, "dtype": str(stored).removeprefix("torch."), "bytes": size, "verified": verified,
            "notes": list(notes), "lost": None if survival is None else survival.lost(),
            "unmoved": None if survival is None else survival.unmoved(),
        }  # fmt: skip
        files = write_report(place, report)
    return Exported(target, report["dtype"], size, seconds, files, survival, verified, notes)


def _watch(survival: Survival | None, stored: torch.dtype) -> Callable[[ExportTensor, Tensor | None], None]:
    def watch(one: ExportTensor, merged: Tensor | None) -> None:
        import torch

        if merged is None or survival is None or not merged.is_floating_point():
            return
        require_finite(one.name, merged, one.dtype_in(stored))
        base = one.read_base() if one.part is not None else one.base.whole()
        if base.shape == merged.shape:
            survival.add(one.name, sample(base).to(torch.float32), sample(merged))

    return watch


def _require_memory(source: ExportSource) -> None:
    free = free_memory()
    if source.largest() > free:
        raise CannotExport(
            f"exporting {source.where}: its largest tensor takes {source.largest():,} bytes of memory in float32 with "
            f"what it is computed from, and {free:,} are available; close other processes, or use another machine"
        )
