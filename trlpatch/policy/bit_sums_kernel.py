"""The Triton kernel of `bit_sums`. Importing it needs Triton, a dependency of torch built for CUDA."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, ROUNDS = 4096, 8
"""Words of 32 bits that a program reads at a time, and how often: 128 KiB in all."""


# No annotations but Triton's own: it evaluates them as part of the kernel.
@triton.jit  # type: ignore[untyped-decorator]
def add_bits(table, where, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add to a tensor's two sums a mix of each word of 32 bits and of its place, and copy it.

    `table` has a tensor's address, number of words (a multiple of four), first program and where it is copied to, or
    0; `where` each program's tensor. A lane's sums are modulo 2**32: an element never moves unseen, nor do two that
    cancel out in plain sums.
    """
    program = tl.program_id(0)
    tensor = tl.load(where + program)
    entry = table + 4 * tensor
    words = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.uint32)), 16)
    count = tl.multiple_of(tl.load(entry + 1), 4)
    address = tl.load(entry + 3)
    target = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
    copied = tl.multiple_of(tl.where(address == 0, 0, count), 4)
    start = (program - tl.load(entry + 2)) * (BLOCK * ROUNDS)
    first = tl.zeros([BLOCK], tl.uint32)
    second = tl.zeros([BLOCK], tl.uint32)
    for step in range(ROUNDS):
        place = start + step * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + place, mask=place < count, other=0)
        tl.store(target + place, word, mask=place < copied)
        # The mixing of MurmurHash3: one to one in the word.
        one = word ^ (place.to(tl.uint32) * 0x9E3779B1)
        one = (one ^ (one >> 16)) * 0x85EBCA6B
        one = (one ^ (one >> 13)) * 0xC2B2AE35
        one = one ^ (one >> 16)
        two = (one ^ (one >> 15)) * 0x27D4EB2F
        first += one
        second += two ^ (two >> 14)
    own = sums + 2 * tensor
    tl.atomic_add(own, tl.sum(first.to(tl.int64), axis=0))
    tl.atomic_add(own + 1, tl.sum(second.to(tl.int64), axis=0))
