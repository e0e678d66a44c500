"""Staging tensors, in the engine's LoRA dtype: they hold the adapter as the engine has it.

They are what the adapter registered with vLLM is made of, so whenever vLLM itself puts it into a slot, after a user's
adapter took the place, the slot gets what was handed over last.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.adapter_tensors import tensor_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK = 2**23  # elements scaled at a time: 32 MiB of float32


def structure_of(weights: LoraWeights) -> list[object]:
    """What a Staging depends on: two adapters of equal structure can be written into the same one."""
    return [
        (path, a.shape, b.shape, a.dtype, b.dtype, a.device, b.device)
        for path, a, b in zip(weights.paths, weights.a, weights.b, strict=True)
    ]


@dataclass(frozen=True)
class Target:
    """Where one tensor of an adapter goes: into the first columns of both."""

    staging: Tensor
    slot: Tensor
    """The part of an engine's buffer that belongs to one slot."""


@dataclass(frozen=True)
class _Group:
    """Layers whose B are of one shape, scaled by one kernel."""

    indices: list[int]
    target: Tensor
    """[layers, out, r], a view of the staging tensors."""


@dataclass(frozen=True)
class _Sources:
    """What one group is written from."""

    b: list[Tensor]
    scale: Tensor
    """[layers, 1, 1], float32, on the device of B."""


class Staging:
    """One A [r, in] and one B [out, width] per layer; columns of B beyond r are zero.

    B is as wide as the engine's buffers because a copy between dense tensors is one kernel for all layers, and one
    into the first r columns of each a kernel per layer.
    """

    def __init__(self, weights: LoraWeights, *, width: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        self._structure = structure_of(weights)
        self.a = [torch.empty(a.shape, dtype=dtype, device=device) for a in weights.a]
        self.b: list[Tensor] = list(weights.b)  # each replaced below
        self._groups: list[_Group] = []
        alike: dict[object, list[int]] = {}
        for index, b in enumerate(weights.b):
            alike.setdefault((b.shape, b.dtype, b.device), []).append(index)
        for indices in alike.values():
            out, rank = weights.b[indices[0]].shape
            step = max(1, _CHUNK // (out * rank))
            for start in range(0, len(indices), step):
                some = indices[start : start + step]
                whole = torch.zeros(len(some), out, width, dtype=dtype, device=device)
                for index, own in zip(some, whole, strict=True):
                    self.b[index] = own
                self._groups.append(_Group(some, whole[:, :, :rank]))

    def named(self, weights: LoraWeights) -> dict[str, Tensor]:
        """The tensors under PEFT's names."""
        return {
            name: tensor
            for path, *both in zip(weights.paths, self.a, self.b, strict=True)
            for name, tensor in zip(tensor_names(path), both, strict=True)
        }

    def fill_with_pattern(self) -> None:
        """Give every tensor values of its own, exact in bfloat16, to recognise it by."""
        import torch

        for number, tensor in enumerate([*self.a, *(group.target for group in self._groups)]):
            values = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
            tensor.copy_((values * 7 + number * 13) % 251 + 1)

    def accepts(self, weights: LoraWeights) -> bool:
        """Have these weights the layers, ranks, dtypes and devices that this was made for?"""
        accepted = weights.derived.get("accepted by staging")
        if accepted is not None and accepted() is self:
            return True
        if self._structure != structure_of(weights):
            return False
        weights.derived["accepted by staging"] = weakref.ref(self)
        return True

    def write(self, weights: LoraWeights) -> None:
        """Fill it with the adapter: A rounded, B scaled in float32 and rounded once."""
        import torch

        sources = self._sources(weights)
        if sources is None:
            sources = [_sources(group, weights) for group in self._groups]
            # Kept with the model: an engine must not keep the tensors of a model that is gone.
            weights.derived["staging"] = (weakref.ref(self), sources)
        torch._foreach_copy_(self.a, weights.a)
        for group, source in zip(self._groups, sources, strict=True):
            together = torch.cat(source.b).view(group.target.shape)
            if together.device == group.target.device:
                torch.mul(together, source.scale, out=group.target)
            else:
                group.target.copy_(together * source.scale)

    def _sources(self, weights: LoraWeights) -> list[_Sources] | None:
        staging, sources = weights.derived.get("staging", (None, None))
        return sources if staging is not None and staging() is self else None


def _sources(group: _Group, weights: LoraWeights) -> _Sources:
    import torch

    b = [weights.b[index] for index in group.indices]
    scalings = [weights.scalings[index] for index in group.indices]
    return _Sources(b, torch.tensor(scalings, dtype=torch.float32, device=b[0].device).view(-1, 1, 1))
