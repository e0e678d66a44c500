"""The Triton kernel of `fused_merge`. Importing it needs Triton, a dependency of torch built for CUDA."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_N, BLOCK_K = 64, 128
"""Rows and columns of one program's tile."""
COLUMNS = 7
"""Of the table: addresses of base, B, A and target; rows and columns; the program of the first tile."""


# No annotations but Triton's own: it evaluates them as part of the kernel.
@triton.jit  # type: ignore[untyped-decorator]
def merge(  # type: ignore[no-untyped-def]
    table,
    scales,
    where,
    BASE: tl.constexpr,
    FACTOR: tl.constexpr,
    TARGET: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write round(base + scale * B @ A) into the target; base and target [N, K], B [N, RANK], A [RANK, K], contiguous.

    One program per tile, row by row: `where` has its matrix. PADDED is RANK or the next power of two.
    """
    program = tl.program_id(0)
    matrix = tl.load(where + program)
    entry = table + COLUMNS * matrix
    base = tl.load(entry).to(tl.pointer_type(BASE))
    left = tl.load(entry + 1).to(tl.pointer_type(FACTOR))
    right = tl.load(entry + 2).to(tl.pointer_type(FACTOR))
    target = tl.load(entry + 3).to(tl.pointer_type(TARGET))
    height = tl.load(entry + 4)
    width = tl.load(entry + 5)
    scale = tl.load(scales + matrix)
    tile = program - tl.load(entry + 6)
    across = (width + BLOCK_K - 1) // BLOCK_K
    row = tile // across * BLOCK_N
    column = tile % across * BLOCK_K
    rows = row + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, PADDED)
    b = tl.load(
        left + rows[:, None] * RANK + ranks[None, :],
        mask=(rows < height)[:, None] & (ranks < RANK)[None, :],
        other=0.0,
    )
    a = tl.load(
        right + ranks[:, None] * width + columns[None, :],
        mask=(ranks < RANK)[:, None] & (columns < width)[None, :],
        other=0.0,
    )
    product = tl.dot(b.to(tl.float32), a.to(tl.float32), input_precision="ieee")
    # Places need 64 bits: an embedding has more than 2**31 bytes. `width` is loaded as such.
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    x = tl.load(base + places, mask=inside, other=0.0)
    tl.store(target + places, (x.to(tl.float32) + scale * product).to(TARGET), mask=inside)
