"""Copy an adapter's tensors, scaled and under PEFT's key names, for vLLM to keep and for files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import LoraWeights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdapterTensors:
    """Copies that vLLM may keep and scale.

    `tensors` has PEFT's key names; every A is [rank, in] in the training dtype, every B [out, rank] in
    float32 with the layer's scaling multiplied in, so vLLM is told `lora_alpha = rank` and scales by one.
    That is right for rsLoRA, `rank_pattern` and `alpha_pattern` on every release (vLLM below 0.32 ignores the
    patterns), and rounds once.
    """

    tensors: dict[str, Tensor]
    rank: int
    targets: tuple[str, ...]
    """Last components of the adapted modules' paths, sorted."""


PEFT_PREFIX = "base_model.model."
"""What stands before a path of the transformers model in a saved PEFT adapter."""


def tensor_names(path: str) -> tuple[str, str]:
    """The names of A and B of a layer in a saved PEFT adapter."""
    return f"{PEFT_PREFIX}{path}.lora_A.weight", f"{PEFT_PREFIX}{path}.lora_B.weight"


def adapter_tensors(weights: LoraWeights) -> AdapterTensors:
    """Scaled copies of the adapter, padded with zeros to one rank.

    vLLM multiplies lora_B in place, and its `.to(device, dtype)` returns the caller's own tensor when nothing
    changes: the training weights themselves must never be handed over.
    """
    import torch

    rank = weights.rank
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, a, b, scaling in zip(weights.paths, weights.a, weights.b, weights.scalings, strict=True):
            own_a = a.detach().clone()
            own_b = b.detach().to(torch.float32) * scaling
            missing = rank - a.shape[0]
            if missing:
                own_a = torch.cat([own_a, own_a.new_zeros(missing, own_a.shape[1])], dim=0)
                own_b = torch.cat([own_b, own_b.new_zeros(own_b.shape[0], missing)], dim=1)
            name_a, name_b = tensor_names(path)
            tensors[name_a], tensors[name_b] = own_a.contiguous(), own_b.contiguous()
    return AdapterTensors(tensors, rank, weights.targets)
