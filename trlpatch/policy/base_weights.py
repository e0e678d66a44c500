"""Fingerprint the base weights under an adapter: have they changed since an engine was attached?"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import CopyUnderway, LoraSnapshot, LoraView, LoraWeights
from trlpatch.policy.change_detection import ContentSums, as_integers
from trlpatch.policy.layer_state import Contents, addresses_of
from trlpatch.policy.sharding import local_of, sharded_by

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
        if weight.device.type != "meta" and weight.numel() and sharded_by(weight) is None:
            found[path.removesuffix(".base_layer")] = weight.detach()
    with torch.no_grad():
        sums = {path: as_integers(weight).sum(dtype=torch.int64) for path, weight in found.items()}
        bits: dict[str, int] = {}
        for device in {one.device for one in sums.values()}:  # one wait for each, not one for each matrix
            there = [path for path, one in sums.items() if one.device == device]
            bits.update(zip(there, torch.stack([sums[path] for path in there]).tolist(), strict=True))
    return {path: Weight(weight.dtype, tuple(weight.shape), bits[path]) for path, weight in found.items()}


_VERSION = attrgetter("_version")
_SPOT = 512  # elements of every matrix


@dataclass
class Spots:
    """A piece of every base weight under the adapters, to be looked at again and again."""

    found_in: Contents
    present: list[Tensor]
    addresses: list[int]
    pieces: list[Tensor]
    """Flat, of at most `_SPOT` elements, each beginning where a vector of 16 elements does."""
    sums: ContentSums
    glance: object | None = None
    numbers: list[int] | None = None
    """The sums, when a copy underway gave `glance`."""

    def look(self, underway: CopyUnderway | None) -> list[int]:
        """Return the sums of the pieces; made anew only where no copy underway says that they are the same."""
        glance = None if underway is None else underway.base_glance(self)
        if glance is None or glance != self.glance or self.numbers is None:
            self.numbers = self.sums.numbers()
            self.glance = glance
        return self.numbers


_SPOTS = "base spots"


def spots_under(weights: LoraWeights) -> Spots | None:
    """The spots under an adapter that `base_mark` was last asked for."""
    spots: Spots | None = weights.derived.get(_SPOTS)
    return spots


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
    spots: Spots | None = layers.derived.get(_SPOTS)
    if spots is None or not spots.found_in.are_the_same() or addresses_of(spots.present) != spots.addresses:
        spots = layers.derived[_SPOTS] = _spots(parameters)
    for adapter in view.active:
        view.weights(adapter).derived[_SPOTS] = spots
    try:
        versions = list(map(_VERSION, spots.present))
    except RuntimeError:  # inference tensors have none
        versions = []
    merged = [str(names) for names in layers.state("merged")] if view.merged else []  # lists that grow and shrink
    underway = view.underway if isinstance(view, LoraSnapshot) else None
    return (spots.addresses, versions, merged, spots.look(underway))


def _spots(parameters: list[dict[str, Tensor | None]]) -> Spots:
    import torch

    found_in = Contents(parameters)
    present = [
        here
        for weight in (own.get("weight") for own in parameters)
        if weight is not None and not (here := local_of(weight)).is_meta and here.numel()
    ]
    with torch.inference_mode(False), torch.no_grad():
        pieces = [spot_of(weight) for weight in present if weight.is_contiguous()]
        return Spots(found_in, present, addresses_of(present), pieces, ContentSums(pieces))


def spot_of(weight: Tensor) -> Tensor:
    """A view of a piece of a contiguous tensor: flat, from the middle on, of at most `_SPOT` elements."""
    flat = weight.detach().view(-1)
    return flat[(flat.numel() - 1) // 2 // 16 * 16 :][:_SPOT]


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
