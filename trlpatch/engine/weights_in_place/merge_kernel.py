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
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write round(base + scale * B @ A) into the target; base and target [N, K], B [N, RANK], A [RANK, K], contiguous.

    One program per tile, row by row: `where` has its matrix. PADDED is RANK or the next power of two.
    ALIGNED: base, A and target begin at multiples of 16 bytes, K is a multiple of 16. Triton knows that of arguments,
    not of addresses from a table, and loads element by element where it does not.
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
    if ALIGNED:
        base, right, target = tl.multiple_of(base, 16), tl.multiple_of(right, 16), tl.multiple_of(target, 16)
        width = tl.multiple_of(width, 16)
    scale = tl.load(scales + matrix)
    tile = program - tl.load(entry + 6)
    across = (width + BLOCK_K - 1) // BLOCK_K
    row = tile // across * BLOCK_N
    column = tile % across * BLOCK_K
    # What is left of the matrix from here on. 64 bits once, not per element: an embedding has more than 2**31 bytes.
    below, beside, width = (height - row).to(tl.int32), (width - column).to(tl.int32), width.to(tl.int32)
    corner = row * width + column
    if ALIGNED:
        beside, width, corner = tl.multiple_of(beside, 16), tl.multiple_of(width, 16), tl.multiple_of(corner, 16)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, PADDED)
    b = tl.load(
        left + row * RANK + rows[:, None] * RANK + ranks[None, :],
        mask=(rows < below)[:, None] & (ranks < RANK)[None, :],
        other=0.0,
    )
    a = tl.load(
        right + column + ranks[:, None] * width + columns[None, :],
        mask=(ranks < RANK)[:, None] & (columns < beside)[None, :],
        other=0.0,
    )
    product = tl.dot(b.to(tl.float32), a.to(tl.float32), input_precision="ieee")
    places = rows[:, None] * width + columns[None, :]
    inside = (rows < below)[:, None] & (columns < beside)[None, :]
    x = tl.load(base + corner + places, mask=inside, other=0.0)
    tl.store(target + corner + places, (x.to(tl.float32) + scale * product).to(TARGET), mask=inside)
