"""The Triton kernel of `expand`; imported on CUDA only."""

from __future__ import annotations

import triton
import triton.language as tl


# No annotations but Triton's own: it evaluates them as part of the kernel.
@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def expand_kernel(  # type: ignore[no-untyped-def]
    wide,
    b,
    bias,
    token_slots,
    active_slots,
    y,
    tokens,
    base,
    width,
    first,
    second,
    RANK: tl.constexpr,
    ACTIVE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """y[m, n] = wide[m, n] + bias[n] + (sum over j of wide[m, base + s·RANK + j] · b[n, j], if token m has a slot).

    s is the slice that column n belongs to: 0 below `first`, 1 below `second`, else 2. One program computes ROWS x
    COLUMNS of y. A token has the adapter if its slot is not negative and the batch has one at all: for a batch
    without, vLLM leaves the tokens' slots as they were and resets the active ones only
    (LoRAKernelMeta.prepare_tensors).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    inside = rows < tokens
    line = rows.to(tl.int64) * width
    total = tl.load(wide + line[:, None] + columns[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + columns).to(tl.float32)[None, :]
    slot = tl.load(token_slots + rows, mask=inside, other=-1)
    if ACTIVE > 0:
        newest = tl.load(active_slots)
        for other in tl.static_range(1, ACTIVE):
            newest = tl.maximum(newest, tl.load(active_slots + other))
        slot = tl.minimum(slot, newest)
    has = slot >= 0
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    part = (start >= first).to(tl.int32) + (start >= second).to(tl.int32)
    for step in tl.static_range(0, RANK, RANKS):
        ranks = step + tl.arange(0, RANKS)
        known = ranks < RANK
        a_x = tl.load(
            wide + line[:, None] + (base + part * RANK + ranks)[None, :], mask=has[:, None] & known[None, :], other=0.0
        )
        weights = tl.load(b + columns.to(tl.int64)[:, None] * RANK + ranks[None, :], mask=known[None, :], other=0.0)
        change += tl.dot(a_x, tl.trans(weights), allow_tf32=False)
    total += tl.where(has[:, None], change, 0.0)  # zeros in A·x do not hide a NaN in B
    place = y + rows.to(tl.int64)[:, None] * base + columns[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=inside[:, None])
