"""Sums of the bits of whole tensors: has what is trained whole changed?

One launch reads everything once where Triton is, and copies it on the way if asked to; torch's own reductions read it
twice. TRLPATCH_MERGE_KERNEL=0 takes torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any

from trlpatch.options import MERGE_KERNEL
from trlpatch.policy import triton_kernels
from trlpatch.policy.change_detection import Sums, as_integers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def bit_sums(tensors: list[Tensor], targets: Sequence[Tensor | None] = ()) -> list[Sums]:
    """Sums of each tensor's bits, by device; they see what version counters do not, as a fused optimizer's step.

    `targets`, where given: for each tensor the place from `copies_of` that it is copied to, or None.
    """
    import torch

    found = []
    pairs = list(zip_longest(tensors, targets))
    with torch.inference_mode(False), torch.no_grad():
        for device in sorted({str(tensor.device) for tensor in tensors}):
            there = [(tensor.detach(), target) for tensor, target in pairs if str(tensor.device) == device]
            fast = wanted(there[0][0].device)
            fused: list[tuple[Tensor, Tensor | None]] = []
            plain: list[tuple[Tensor, Tensor | None]] = []
            for pair in there:
                (fused if fast and readable_by_kernel(pair[0]) else plain).append(pair)
            found += [Sums(torch.stack([_bits_of(tensor) for tensor, _ in plain]))] if plain else []
            for tensor, target in plain:  # `copies_of` has none of these, unless the kernel was switched off since
                if target is not None:
                    target.copy_(tensor)
            found += [Sums(_by_kernel(fused))] if fused else []
    return found


def copies_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Of pairs (tensor, target of its shape), by id of the tensor, those that are copied while they are summed."""
    found: dict[int, Tensor] = {}
    fast = cache(wanted)  # it reads the environment
    for tensor, target in pairs:
        alike = (tensor.device, tensor.dtype) == (target.device, target.dtype)
        if alike and fast(tensor.device) and readable_by_kernel(tensor) and readable_by_kernel(target):
            found.setdefault(id(tensor), target)
    return found


def kernel_module() -> Any:
    """The module of the kernel, or None where there is no Triton."""
    return triton_kernels.kernel_module("trlpatch.policy.bit_sums_kernel", "add_bits")


def wanted(device: torch.device) -> bool:
    """Can the kernel run on this device, and was it not switched off?"""
    return triton_kernels.wanted(device, kernel_module(), MERGE_KERNEL)


def readable_by_kernel(tensor: Tensor) -> bool:
    """Is it dense, and of whole vectors of 16 bytes, as nearly every weight is?"""
    return bool(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 and tensor.nbytes % 16 == 0)


def _by_kernel(pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """[pairs, 2] int64, all on one device. The host waits for what is queued before, and not for the sums."""
    import torch

    module = kernel_module()
    device = pairs[0][0].device
    words = [tensor.nbytes // 4 for tensor, _ in pairs]
    programs = [-(-count // (module.BLOCK * module.ROUNDS)) for count in words]
    addresses = [tensor.data_ptr() for tensor, _ in pairs]
    targets = [0 if target is None else target.data_ptr() for _, target in pairs]
    starts = accumulate(programs, initial=0)
    rows = list(zip(addresses, words, starts, targets))  # noqa: B905  # the sum of all is left over
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    where = triton_kernels.owners(programs, device)
    sums = torch.zeros(len(pairs), 2, dtype=torch.int64, device=device)
    with triton_kernels.on(device):
        module.add_bits[(len(where),)](table, where, sums, BLOCK=module.BLOCK, ROUNDS=module.ROUNDS, num_warps=4)
    return sums


def _bits_of(tensor: Tensor) -> Tensor:
    """Sum words of 64 bits, and their upper halves: of narrower integers torch first writes a copy four times as big.

    Sums of words are modulo 2**64, where the signs of an even number of their last elements cancel: the upper halves'
    are exact, so that both together are the exact sums of both halves.
    """
    import torch

    flat = tensor.contiguous().view(-1)
    per_word = 8 // flat.element_size()
    odd = flat.numel() % per_word
    if flat.storage_offset() % per_word or flat.numel() == odd:
        return as_integers(flat).sum(dtype=torch.int64).expand(2)
    words = flat[: flat.numel() - odd].view(torch.int64)
    sums = torch.stack([words.sum(), (words >> 32).sum()])
    return sums + as_integers(flat[-odd:]).sum(dtype=torch.int64) if odd else sums
