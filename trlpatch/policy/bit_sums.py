"""Sums of the bits of whole tensors: has what is trained whole changed?

One launch reads everything once where Triton is; torch's own reductions read it twice. TRLPATCH_MERGE_KERNEL=0 takes
torch's.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from trlpatch.options import MERGE_KERNEL
from trlpatch.policy import triton_kernels
from trlpatch.policy.change_detection import Sums, as_integers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def bit_sums(tensors: list[Tensor]) -> list[Sums]:
    """Sums of each tensor's bits, by device; they see what version counters do not, as a fused optimizer's step."""
    import torch

    found = []
    with torch.inference_mode(False), torch.no_grad():
        for device in sorted({str(tensor.device) for tensor in tensors}):
            there = [tensor.detach() for tensor in tensors if str(tensor.device) == device]
            fused = [tensor for tensor in there if readable_by_kernel(tensor)] if wanted(there[0].device) else []
            chosen = {id(tensor) for tensor in fused}
            plain = [_bits_of(tensor) for tensor in there if id(tensor) not in chosen]
            found += [Sums(torch.stack(plain))] if plain else []
            found += [Sums(_by_kernel(fused))] if fused else []
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


def _by_kernel(tensors: list[Tensor]) -> Tensor:
    """[tensors, 2] int64, all on one device. The host waits for what is queued before, and not for the sums."""
    import torch

    module = kernel_module()
    device = tensors[0].device
    words = [tensor.nbytes // 4 for tensor in tensors]
    programs = [-(-count // (module.BLOCK * module.ROUNDS)) for count in words]
    addresses = [tensor.data_ptr() for tensor in tensors]
    rows = list(zip(addresses, words, accumulate(programs, initial=0)))  # noqa: B905  # the sum of all is left over
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    where = triton_kernels.owners(programs, device)
    sums = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device)
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
