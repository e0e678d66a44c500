"""The second half of a linear layer with one adapter on CUDA: launch `expand_kernel` on the widened GEMM's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 64
"""Output columns per program; a slice of a packed layer is a multiple of it (`fits`)."""
_RANKS = 64
"""Columns of B per step of the inner product."""


def fits(sizes: list[int]) -> bool:
    """Can the kernel serve a layer whose slices have these many output rows?"""
    return len(sizes) <= 3 and all(size % COLUMNS == 0 for size in sizes)


def expand(
    wide: Tensor, b: Tensor, bias: Tensor | None, token_slots: Tensor, active_slots: Tensor | None, starts: list[int]
) -> Tensor:
    """Return y [M, N]: the first N columns of `wide` [M, P], the bias and, where a token has the adapter, B·(A·x).

    `wide` holds W·x and A·x; see `linear.operator` for the other arguments. Sums are float32, rounded once.
    """
    import torch

    from trlpatch.engine.single_adapter.expand_kernel import expand_kernel

    (tokens, width), (base, rank) = wide.shape, b.shape
    y = torch.empty(tokens, base, dtype=wide.dtype, device=wide.device)
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    ranks = min(_RANKS, max(16, 1 << (rank - 1).bit_length()))  # tl.dot takes 16 and more
    first, second = (*starts, base, base)[:2]
    expand_kernel[((tokens + rows - 1) // rows, base // COLUMNS)](
        wide,
        b,
        y if bias is None else bias,
        token_slots,
        token_slots if active_slots is None else active_slots,
        y,
        tokens,
        base,
        width,
        first,
        second,
        RANK=rank,
        ACTIVE=0 if active_slots is None else active_slots.shape[0],
        BIAS=bias is not None,
        ROWS=rows,
        COLUMNS=COLUMNS,
        RANKS=ranks,
        num_warps=4,
    )
    return y
