"""ExportSource: the seam of every export. A model in training, a checkpoint or an adapter, one tensor at a time.

    from trlpatch.export.opening import open_source

    source = open_source(model_or_directory, tokenizer=tokenizer, base=None)
    for name, tensor, adapted in source.stream():  # float32 on the CPU, the adapter in it
        ...
    source.save_settings(directory)  # config.json, generation_config.json, tokenizer, chat template

There is never a second copy of the model: base tensors come from the checkpoint's files or from the live parameters as
they are asked for, and an adapter is added to a float32 copy of one of them. The base of a trainer in 4 bits is the
checkpoint that it was quantized from, never the 4-bit weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.export.base import BaseTensor
from trlpatch.export.changes import Site
from trlpatch.export.names import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 32 << 20
"""Elements of a tensor that are held at a time, where a part of it will do: 128 MiB in float32."""


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of the exported model, not read yet."""

    name: str
    """As transformers' checkpoints of this architecture have it."""
    base: BaseTensor
    """Of the base model; its shape and dtype are those of this tensor before any rounding."""
    site: Site | None = None
    leaf: str = ""
    siblings: dict[str, BaseTensor] = field(default_factory=dict, repr=False)
    """Base tensors of the same module by their names in it."""
    keep_dtype: bool = False
    """It is stored in more bits than the rest on purpose, and stays so."""
    part: Part | None = None
    """Of a parameter that checkpoints of this architecture have in several tensors: which one this is."""

    @property
    def adapted(self) -> bool:
        """Does the adapter change it?"""
        return self.site is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the exported tensor."""
        return self.base.shape if self.part is None else self.part.shape

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """What it is stored as in an export in `dtype`."""
        import torch

        kept = self.keep_dtype or not self.base.dtype.is_floating_point
        return self.base.dtype if kept and self.base.dtype != torch.float64 else dtype

    def read(self) -> Tensor:
        """The tensor with the adapter in it: float32 where it is floating point, on the CPU, not to be written to."""
        if self.part is not None:
            return self.part.of(self._merged, "merged")
        return self._merged()

    def read_base(self) -> Tensor:
        """The same tensor without the adapter."""
        return self._base() if self.part is None else self.part.of(self._base, "base")

    def _merged(self) -> Tensor:
        return self._base() if self.site is None else self.site.merged(self.leaf, self._copy)

    def _base(self) -> Tensor:
        import torch

        found = self.base.whole()
        return found.to(torch.float32) if found.is_floating_point() else found

    def _copy(self, leaf: str) -> Tensor:
        import torch

        found = self.siblings[leaf].whole()
        return found.to(torch.float32, copy=True) if found.is_floating_point() else found.clone()

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor in `dtype_in(dtype)`, in blocks of rows; one that no adapter changes is never held as a whole."""
        stored = self.dtype_in(dtype)
        if self.site is not None or self.part is not None:
            yield self.read().to(stored)
            return
        rows = self.base.shape[0] if self.base.shape else 1
        step = max(1, BLOCK * rows // max(1, self.base.elements))
        for start in range(0, rows, step):
            yield self.base.rows(start, min(rows, start + step)).to(stored)


@dataclass(frozen=True, eq=False)
class ExportSource:
    """What is exported. Made by `open_source`."""

    where: str
    """Names it in messages."""
    tensors: tuple[ExportTensor, ...]
    """In the order in which they are best read; a tied tensor is among them once."""
    config: Any
    """transformers' config: without quantization, and with ties as the exported tensors have them."""
    generation_config: Any
    """None where there is none; one that transformers saves (sampling values imply do_sample=True)."""
    tokenizer: Any
    """Or a processor; None where none was found."""
    adapter: str | None
    """The name of the adapter that is merged; None for a model without one."""
    kinds: dict[str, int]
    """How an adapter is merged -> number of modules: "lora", "peft", "replaced", "rows"."""
    base_name: str
    """The base model, as its config calls it."""
    notes: tuple[str, ...]
    """What a reader of the export should know (embeddings that had to be untied, ...)."""
    model: Any
    """The PEFT model that carries the adapter, with base weights (live) or on the meta device; None without one."""
    base_directory: Path | None
    """The checkpoint that base tensors are read from; None when they are the live model's."""
    base: Mapping[str, BaseTensor] = field(default_factory=dict, repr=False)
    """Every base tensor by its name in the model, tied ones under each."""
    trust_remote_code: bool = False
    inputs: tuple[Path, ...] = ()
    """Directories that an export must not replace."""
    processor: tuple[Path, ...] = ()
    """Files of the processor of a model that reads images, where `tokenizer` is none."""

    def stream(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, tensor as `ExportTensor.read` has it, is it changed by the adapter?)."""
        for tensor in self.tensors:
            yield tensor.name, tensor.read(), tensor.adapted

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(one.elements for one in self.tensors)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of most elements of the base."""
        import torch

        counts: dict[torch.dtype, int] = {}
        for one in self.tensors:
            if one.base.dtype.is_floating_point:
                counts[one.base.dtype] = counts.get(one.base.dtype, 0) + one.base.elements
        return max(counts, key=counts.__getitem__) if counts else torch.float32

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors in an export in `dtype`."""
        return sum(one.elements * one.dtype_in(dtype).itemsize for one in self.tensors)

    def largest(self) -> int:
        """Bytes that a stream works with: float32 copies of the largest tensor that is read whole."""
        wholes = [one.base.elements for one in self.tensors if one.adapted or one.part]
        return 4 * max([BLOCK, *(3 * count for count in wholes)])

    def save_settings(self, directory: Path, *, dtype: torch.dtype | None = None) -> list[str]:
        """Write config.json, generation_config.json, tokenizer or processor, chat template; the names of the files."""
        from trlpatch.export.settings import save_settings

        return save_settings(
            directory, self.config, self.generation_config, self.tokenizer, processor=self.processor, dtype=dtype
        )

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer or processor and its chat template, where there is one."""
        from trlpatch.export.settings import save_processing

        save_processing(directory, self.tokenizer, self.processor)
