"""An adapter that arrived by message, as the training tensors that an adapter sync reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.adapter_tensors import PEFT_PREFIX
from trlpatch.ray.packed import PackedAdapter

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.policy.adapter_tensors import AdapterTensors

_SIDES = (".lora_A.weight", ".lora_B.weight")


def lora_weights(
    adapter: AdapterTensors | PackedAdapter, before: LoraWeights | None = None, *, device: Any = "cpu"
) -> LoraWeights:
    """Give A and B per layer, on `device`; the scaling is in B already.

    Where `before`, made of the version before, has the same layers and shapes, it is written over and returned: an
    adapter sync keeps with an object what it has derived from it.
    """
    import torch

    arrived = adapter.unpack(device) if isinstance(adapter, PackedAdapter) else adapter
    a, b = (_side(arrived.tensors, side) for side in _SIDES)
    if before is not None and _alike(before, a, b):
        with torch.no_grad():
            torch._foreach_copy_(before.parameters, [*a.values(), *b.values()])
        return before
    # Clones: what comes out of the object store is other processes' memory, too.
    own_a, own_b = ([tensor.to(device).clone() for tensor in side.values()] for side in (a, b))
    return LoraWeights(tuple(a), own_a, own_b, [1.0] * len(own_a), [])


def _side(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }


def _alike(before: LoraWeights, a: dict[str, Any], b: dict[str, Any]) -> bool:
    return before.paths == tuple(a) and all(
        old.shape == new.shape and old.dtype == new.dtype
        for old, new in zip(before.parameters, [*a.values(), *b.values()], strict=True)
    )
