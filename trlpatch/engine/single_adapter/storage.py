"""Weights of linear layers with room below them: [N, K] of the base model, then rows for LoRA's A matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ATTRIBUTE = "_trlpatch_rows"
_MULTIPLE = 64
"""Rows are padded to it: the leading dimension of the GEMM's output, which cuBLAS's fast kernels want aligned."""


@dataclass(frozen=True)
class Rows:
    """The storage of one layer.

    Attributes:
        full: [P, K], the layer's dtype: N rows of the base weight, `rank` rows per part of the layer, padding.
        base: N.
        rank: rows for each A.
        parts: how many A matrices there is room for: 3 for q, k and v, 2 for gate and up, else 1.
    """

    full: Tensor
    base: int
    rank: int
    parts: int


def rows_of(layer: object) -> Rows | None:
    """The storage of a linear layer of vLLM's that was built inside `with_rows`; None for any other."""
    return getattr(layer, _ATTRIBUTE, None)


@contextlib.contextmanager
def with_rows(max_lora_rank: int) -> Iterator[None]:
    """Give unquantized column and row parallel layers that are built inside the block `max_lora_rank` rows per part.

    The weight is allocated with them: an extended copy after loading would need the memory twice. Loaders and the
    views of shared weights see [N, K], contiguous, as ever.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod

    theirs = UnquantizedLinearMethod.create_weights

    def create_weights(
        self: Any,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *arguments: Any,
        **attributes: Any,
    ) -> None:
        kept = isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer.tp_size == 1
        base, parts = sum(output_partition_sizes), len(output_partition_sizes)
        room = parts * max_lora_rank
        sizes = [*output_partition_sizes, room + -(base + room) % _MULTIPLE] if kept else output_partition_sizes
        theirs(self, layer, input_size_per_partition, sizes, *arguments, **attributes)
        if kept:
            full = layer.weight.data
            full[base:].zero_()  # a NaN in a row would be one in A·x
            layer.weight.data = full[:base]
            setattr(layer, _ATTRIBUTE, Rows(full, base, max_lora_rank, parts))

    UnquantizedLinearMethod.create_weights = create_weights
    try:
        yield
    finally:
        UnquantizedLinearMethod.create_weights = theirs


@contextlib.contextmanager
def rows_follow_loading() -> Iterator[None]:
    """Copy weights that are loaded anew inside the block into the storage that the operator reads.

    On vLLM's CPU backend a reload makes new tensors, packs them for vLLM's own kernels and fills those that were
    packed before: `Rows.full`, where the weights were loaded first, is none of them.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    theirs = UnquantizedLinearMethod.process_weights_after_loading

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        rows = rows_of(layer)
        if rows is not None:
            rows.full[: rows.base].copy_(layer.weight.data)
        theirs(self, layer)

    UnquantizedLinearMethod.process_weights_after_loading = process_weights_after_loading
    try:
        yield
    finally:
        UnquantizedLinearMethod.process_weights_after_loading = theirs
