"""One Triton launch per dtype and rank for the LoRA merge of all layers: base read once, target written once.

TRLPATCH_MERGE_KERNEL=0 takes torch's products instead, whose results are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trlpatch.options import MERGE_KERNEL
from trlpatch.policy import triton_kernels
from trlpatch.policy.policy_weights import PolicyWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_RANK = 64
"""A program holds tiles of both factors as wide as the rank; above this torch's products are as good."""


def kernel_module() -> Any:
    """The module of the kernel, or None where there is no Triton."""
    return triton_kernels.kernel_module("trlpatch.engine.weights_in_place.merge_kernel", "merge")


def wanted(device: torch.device) -> bool:
    """Can the kernel run on this device, and was it not switched off?"""
    return triton_kernels.wanted(device, kernel_module(), MERGE_KERNEL)


def mergeable(weight: PolicyWeight, target: Tensor) -> bool:
    """One product on top of a matrix, all of it dense and on the target's device."""
    if weight.magnitude is not None or len(weight.terms) != 1 or target.dim() != 2:
        return False
    term = weight.terms[0]
    tensors = [weight.base, term.left, term.right, target]
    return (
        term.left.dtype == term.right.dtype
        and term.left.shape[1] <= LARGEST_RANK
        and all(tensor.device == target.device and tensor.is_contiguous() for tensor in tensors)
    )


def write(pairs: list[tuple[PolicyWeight, Tensor]]) -> None:
    """Merge every pair, each `mergeable`, on the current stream; all on one device."""
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype, int, bool], list[tuple[PolicyWeight, Tensor]]] = {}
    for weight, target in pairs:
        left = weight.terms[0].left
        alike = (weight.base.dtype, left.dtype, target.dtype, left.shape[1], _aligned(weight, target))
        groups.setdefault(alike, []).append((weight, target))
    with triton_kernels.on(pairs[0][1].device):
        for (base, factor, to, rank, aligned), group in groups.items():
            _launch(group, base, factor, to, rank, aligned=aligned)


def _aligned(weight: PolicyWeight, target: Tensor) -> bool:
    """Does every row of the wide tensors begin at a multiple of 16 bytes and of elements?"""
    wide = (weight.base, weight.terms[0].right, target)
    return target.shape[1] % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in wide)


def _launch(
    group: list[tuple[PolicyWeight, Tensor]],
    base: torch.dtype,
    factor: torch.dtype,
    to: torch.dtype,
    rank: int,
    *,
    aligned: bool,
) -> None:
    import torch

    module = kernel_module()
    device = group[0][1].device
    rows: list[list[int]] = []
    tiles: list[int] = []
    first = 0
    for weight, target in group:
        term = weight.terms[0]
        tensors = (weight.base, term.left, term.right, target)
        height, width = target.shape
        rows.append([*(tensor.data_ptr() for tensor in tensors), height, width, first])
        tiles.append(-(-height // module.BLOCK_N) * -(-width // module.BLOCK_K))
        first += tiles[-1]
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=torch.int64).to(device)
        scales = torch.tensor([weight.terms[0].scale for weight, _ in group], dtype=torch.float32).to(device)
        where = triton_kernels.owners(tiles, device)
    module.merge[(first,)](
        table,
        scales,
        where,
        BASE=triton_kernels.language(base),
        FACTOR=triton_kernels.language(factor),
        TARGET=triton_kernels.language(to),
        RANK=rank,
        PADDED=max(16, 1 << (rank - 1).bit_length()),
        ALIGNED=aligned,
        BLOCK_N=module.BLOCK_N,
        BLOCK_K=module.BLOCK_K,
        COLUMNS=module.COLUMNS,
        num_warps=4,
    )
