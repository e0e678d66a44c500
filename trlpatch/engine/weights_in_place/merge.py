"""Merge with torch's own operations, on any device: the product in float32, rounded once into the engine's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trlpatch.policy.policy_weights import PolicyWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 2**23
"""Elements merged at a time: 32 MiB of float32, and with DoRA twice that."""
_LARGE = 2**20
"""Elements from which a plain weight is copied by itself."""


def write(weight: PolicyWeight, target: Tensor) -> None:
    """Fill `target`, of the shape of `weight.base`, with the policy's parameter."""
    if weight.plain:
        target.copy_(weight.base.detach())
        return
    for rows in row_chunks(target):
        target[rows].copy_(merged(weight, rows, target.device))


def copy_all(pairs: list[tuple[PolicyWeight, Tensor]]) -> None:
    """As `write`, of plain weights, by few launches: a 7B model has 339 parameters, nearly half of them small.

    Large ones by themselves: `_foreach_copy_` moves them at two thirds of the device's speed (torch 2.11, H200).
    """
    import torch

    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for weight, target in pairs:
        base = weight.base.detach()
        if base.numel() >= _LARGE:
            target.copy_(base)
            continue
        targets, sources = alike.setdefault((base.dtype, base.device), ([], []))
        targets.append(target)
        sources.append(base)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


def row_chunks(target: Tensor) -> Iterator[slice]:
    """Runs of rows of at most `CHUNK` elements, one row at least."""
    step = max(1, CHUNK // max(1, target[0].numel()))
    for start in range(0, target.shape[0], step):
        yield slice(start, start + step)


def merged(weight: PolicyWeight, rows: slice, device: torch.device) -> Tensor:
    """Some rows of the policy's parameter in float32, of the shape of those rows of `weight.base`."""
    import torch

    base = weight.base.detach()[rows]
    whole = base.to(device=device, dtype=torch.float32)
    if whole.dim() == 1:
        whole = whole[:, None]
    for term in weight.terms:
        left, right = (side.to(device=device, dtype=torch.float32) for side in (term.left[rows], term.right))
        whole = torch.addmm(whole, left, right, alpha=term.scale)
    if weight.magnitude is not None:  # PEFT's DoRA: the norm is the merged weight's, row by row
        length = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
        whole = whole * (weight.magnitude[rows].to(device=device, dtype=torch.float32)[:, None] / length)
    return whole.view(base.shape)


@contextmanager
def float32_products() -> Iterator[None]:
    """For the time of a `with`: no autocast, and no TF32 in products of float32."""
    import torch

    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # torch 2.9+ refuses these two where its newer settings were used
        before = None
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
