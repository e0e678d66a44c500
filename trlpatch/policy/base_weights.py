"""Fingerprint the base weights under an adapter: have they changed since an engine was attached?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import LoraView
from trlpatch.policy.change_detection import as_integers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True)
class Weight:
    """What is remembered of one weight matrix."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bits: int
    """The sum of its elements' bits, read as integers."""


def weights_now(base: Module) -> dict[str, Weight]:
    """Every weight matrix of the model by path, without adapters; not those with an adapter merged into them."""
    import torch

    found: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        weight = module._parameters.get("weight")
        parent = base.get_submodule(path.rpartition(".")[0])
        if weight is None or weight.dim() != 2 or ".lora_" in path or getattr(parent, "merged", False):
            continue
        if weight.device.type != "meta" and weight.numel() and not hasattr(weight, "full_tensor"):
            found[path.removesuffix(".base_layer")] = weight.detach()
    with torch.no_grad():
        sums = [as_integers(weight).sum(dtype=torch.int64) for weight in found.values()]
        bits = torch.stack([one.cpu() for one in sums]).tolist() if sums else []
    return {
        path: Weight(weight.dtype, tuple(weight.shape), number)
        for (path, weight), number in zip(found.items(), bits, strict=True)
    }


def changed_since(before: dict[str, Weight] | None, view: LoraView) -> str | None:
    """The first adapted base weight that is not what it was `before` (None: nothing is known) is the reason.

    An earlier adapter was merged into it: by the user, or by TRL (GRPO and RLOO 0.22-0.26 and OnlineDPO below 0.27 do
    that when they get a PEFT model and a `peft_config`). Weights of another dtype or shape than before do not count.
    """
    if before is None:
        return None
    now = weights_now(view.base)
    for path, _ in view.layers:
        old, new = before.get(path), now.get(path)
        if old is None or new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            continue
        if old.bits != new.bits:
            return f"the base weight of {path!r} is not the one that the engine was attached with"
    return None
