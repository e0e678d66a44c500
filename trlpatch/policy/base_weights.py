"""Fingerprint the base weights under an adapter: have they changed since an engine was attached?"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter, is_, methodcaller
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import LoraView
from trlpatch.policy.change_detection import ContentSums, as_integers

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
        sums = {path: as_integers(weight).sum(dtype=torch.int64) for path, weight in found.items()}
        bits: dict[str, int] = {}
        for device in {one.device for one in sums.values()}:  # one wait for each, not one for each matrix
            there = [path for path, one in sums.items() if one.device == device]
            bits.update(zip(there, torch.stack([sums[path] for path in there]).tolist(), strict=True))
    return {path: Weight(weight.dtype, tuple(weight.shape), bits[path]) for path, weight in found.items()}


_VERSION, _ADDRESS = attrgetter("_version"), methodcaller("data_ptr")
_SPOT = 512  # elements of every matrix


@dataclass(frozen=True)
class _Spots:
    """A piece of every base weight under the adapters, to be looked at again and again."""

    weights: list[Tensor | None]
    present: list[Tensor]
    addresses: list[int]
    sums: ContentSums


def base_mark(view: LoraView) -> tuple[object, ...]:
    """What is equal as long as the base weights under the adapters are, at the cost of a glance.

    Who writes through a parameter moves its version counter; who gives it other storage, its address. PEFT merges
    and unmerges through `.data`, which moves neither, and so do fused optimizers: both move nearly every matrix, or
    after a rounding back some elements in a thousand of all of them, and a spot check of each sees that.
    """
    layers = view.found
    parameters: list[dict[str, Tensor | None]] | None = layers.derived.get("base parameters")
    if parameters is None:
        bases = [layer.get_base_layer() for _, layer in view.layers]
        parameters = layers.derived["base parameters"] = [getattr(base, "_parameters", {}) for base in bases]
    weights = [own.get("weight") for own in parameters]
    spots: _Spots | None = layers.derived.get("base spots")
    if (
        spots is None
        or not all(map(is_, weights, spots.weights))
        or list(map(_ADDRESS, spots.present)) != spots.addresses
    ):
        spots = layers.derived["base spots"] = _spots(weights)
    try:
        versions = list(map(_VERSION, spots.present))
    except RuntimeError:  # inference tensors have none
        versions = []
    merged = layers.state("merged")
    merged = [str(names) for names in merged] if any(merged) else []  # the lists themselves grow and shrink
    return (spots.addresses, versions, merged, spots.sums.numbers())


def _spots(weights: list[Tensor | None]) -> _Spots:
    import torch

    present = [
        weight
        for weight in weights
        if weight is not None
        and weight.device.type != "meta"
        and weight.numel()
        and not hasattr(weight, "full_tensor")
    ]
    with torch.inference_mode(False), torch.no_grad():
        flat = [weight.detach().view(-1) for weight in present if weight.is_contiguous()]
        pieces = [one[(one.numel() - 1) // 2 :][:_SPOT] for one in flat]
        return _Spots(weights, present, list(map(_ADDRESS, present)), ContentSums(pieces))


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
