"""The Triton kernel of `fused_copy`. Importing it needs Triton, a dependency of torch built for CUDA."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Elements of one program, and of one pair of hashes."""
COLUMNS = 6
"""Of the table: addresses of source, staging and slot; elements; length of a source row, stride of a target row.

Without a staging address the source is hashed only.
"""


# No annotations but Triton's own: it evaluates them as part of the kernel.
@triton.jit(do_not_specialize=["step"])  # type: ignore[untyped-decorator]
def copy_and_hash(  # type: ignore[no-untyped-def]
    table,
    scales,
    where,
    hashes,
    changed,
    step,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,
    TARGET: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write round(scale * x) into staging and slot; write `step` to `changed` where a hash is not the one kept.

    `changed` has two numbers, of what is copied and of what is only hashed. One program per block: `where` has its
    tensor and its first element, `hashes` its two numbers. Both are sums over the block, modulo 2**32, of a mix of an
    element's bits and its place: equal sums of other bits need two coincidences in 2**32, and elements that swap
    places or move against each other are no coincidence. A block whose sums are others keeps them.
    """
    program = tl.program_id(0)
    tensor = tl.load(where + 2 * program)
    start = tl.load(where + 2 * program + 1)
    row = table + COLUMNS * tensor
    source = tl.load(row).to(tl.pointer_type(SOURCE))
    address = tl.load(row + 1)
    staging = address.to(tl.pointer_type(TARGET))
    slot = tl.load(row + 2).to(tl.pointer_type(TARGET))
    count = tl.load(row + 3).to(tl.int32)
    length = tl.load(row + 4).to(tl.int32)
    stride = tl.load(row + 5).to(tl.int32)
    scale = tl.load(scales + tensor)
    written = tl.where(address == 0, 0, count)
    start = tl.multiple_of(start, BLOCK)
    if ALIGNED:
        source, staging, slot = tl.multiple_of(source, 16), tl.multiple_of(staging, 16), tl.multiple_of(slot, 16)
        count, written = tl.multiple_of(count, 16), tl.multiple_of(written, 16)
    index = tl.arange(0, BLOCK)
    offsets = start + index
    inside = offsets < count
    x = tl.load(source + offsets, mask=inside, other=0.0)
    y = (x.to(tl.float32) * scale).to(TARGET)
    copied = offsets < written
    if length == stride:
        tl.store(staging + offsets, y, mask=copied)
        tl.store(slot + offsets, y, mask=copied)
    else:  # the columns beyond the rank are left as they are: zero
        places = (offsets // length) * stride + offsets % length
        tl.store(staging + places, y, mask=copied)
        tl.store(slot + places, y, mask=copied)
    # The mixing of MurmurHash3: one to one, so that a single element never moves unseen.
    one = x.to(BITS, bitcast=True).to(tl.uint32) ^ (index.to(tl.uint32) * 0x9E3779B1)
    one = (one ^ (one >> 16)) * 0x85EBCA6B
    one = (one ^ (one >> 13)) * 0xC2B2AE35
    one = one ^ (one >> 16)
    two = (one ^ (one >> 15)) * 0x27D4EB2F
    two = two ^ (two >> 14)
    # Triton 3.6's interpreter does not let a sum of int32 wrap around.
    first = tl.sum(one.to(tl.int64), axis=0).to(tl.int32)
    second = tl.sum(two.to(tl.int64), axis=0).to(tl.int32)
    kept = hashes + 2 * program
    # Masks, not a branch: one thread stores, and the others may see its store already when they load.
    moved = (tl.load(kept) != first) | (tl.load(kept + 1) != second)
    tl.store(kept, first, mask=moved)
    tl.store(kept + 1, second, mask=moved)
    tl.store(changed + (address == 0).to(tl.int32), step, mask=moved)
