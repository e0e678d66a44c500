"""Gather an adapter whose parameters are sharded over ranks: the adapter alone, never the base model.

Everything here that is public is a collective: every rank of the parameters' groups calls it, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.sharding import Placed, local_of, shape_of, sharded_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLAT = 2**25  # bytes of one rank that one collective carries at most
_ALIGNED = 16  # bytes: a part of the flat buffer is viewed in its own dtype afterwards


def highest_of_all_ranks(weights: LoraWeights, number: int) -> int:
    """The largest `number` that a rank has come with: one all_reduce(MAX) for each dimension of the mesh."""
    import torch
    from torch import distributed

    for groups, device in _meeting_points(weights.parameters):
        value = torch.tensor([number], dtype=torch.int32, device=device)
        for group in groups:  # the highest of each row, then of all rows
            distributed.all_reduce(value, op=distributed.ReduceOp.MAX, group=group)
        number = int(value.item())
    return number


def _meeting_points(parameters: Iterable[Any]) -> Iterator[tuple[list[Any], torch.device]]:
    meshes: list[Any] = []
    zero3: list[Any] = []
    for parameter in parameters:
        if hasattr(parameter, "full_tensor"):
            if all(parameter.device_mesh is not mesh for mesh in meshes):
                meshes.append(parameter.device_mesh)
                mesh = parameter.device_mesh
                yield [mesh.get_group(dim) for dim in range(mesh.ndim)], _device_of(mesh.device_type)
        elif hasattr(parameter, "ds_id") and all(parameter.ds_process_group is not group for group in zero3):
            zero3.append(parameter.ds_process_group)
            yield [parameter.ds_process_group], _device_of(None)


def _device_of(kind: str | None) -> torch.device:
    """The current device of that kind; None: of DeepSpeed's. What CPU offload keeps on the host is gathered there."""
    import torch

    if kind is None:
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def gather(weights: LoraWeights) -> LoraWeights:
    """The adapter with whole tensors: copies, the same object with new contents at every call while it can be.

    FSDP2: local shards, padded to equal rows, as bytes in one flat all_gather per group (and 32 MiB). ZeRO-3:
    `GatheredParameters` of the adapter's parameters alone, whether or not DeepSpeed has them gathered at the moment.
    """
    import torch

    found: _Whole | None = weights.derived.get("whole")
    if found is None:
        with torch.inference_mode(False):
            found = weights.derived["whole"] = _Whole(weights)
    with torch.no_grad():
        found.fill(weights.parameters)
    return found.weights


@dataclass(frozen=True)
class _Flat:
    """Shards that one collective carries."""

    placed: list[Placed]
    indices: list[int]


class _Whole:
    """Whole tensors of a sharded adapter, and which collectives fill them."""

    def __init__(self, weights: LoraWeights) -> None:
        import torch

        parameters: list[Any] = weights.parameters
        self._buffers: list[Tensor] = []
        self._each: list[int] = []
        self._zero3: list[int] = []
        shards: dict[tuple[int, torch.device], list[tuple[int, Placed]]] = {}
        for index, parameter in enumerate(parameters):
            device = parameter.device
            if hasattr(parameter, "full_tensor"):
                device = _device_of(parameter.device_mesh.device_type)
                placed = sharded_once(parameter)
                if placed is None:
                    self._each.append(index)
                else:
                    shards.setdefault((id(placed.group), device), []).append((index, placed))
            elif hasattr(parameter, "ds_id"):
                device = _device_of(None)
                self._zero3.append(index)
            else:
                self._each.append(index)
            self._buffers.append(torch.empty(shape_of(parameter), dtype=parameter.dtype, device=device))
        self._flat = [part for some in shards.values() for part in _parts(some, parameters)]
        half = len(self._buffers) // 2
        a, b = self._buffers[:half], self._buffers[half:]
        addresses = [buffer.data_ptr() for buffer in self._buffers]
        self.weights = LoraWeights(weights.paths, a, b, weights.scalings, addresses)

    def fill(self, parameters: list[Any]) -> None:
        for part in self._flat:
            self._gather_flat(part, parameters)
        for index in self._each:
            parameter = parameters[index]
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            self._buffers[index].copy_(whole.detach())
        if self._zero3:
            import deepspeed  # `deepspeed.zero` is an attribute, no module

            with deepspeed.zero.GatheredParameters([parameters[index] for index in self._zero3], modifier_rank=None):
                for index in self._zero3:
                    self._buffers[index].copy_(parameters[index].detach())

    def _gather_flat(self, part: _Flat, parameters: list[Any]) -> None:
        import torch
        from torch import distributed

        device = self._buffers[part.indices[0]].device
        shards = [parameters[index] for index in part.indices]
        sizes = list(map(_flat_bytes, shards, part.placed))
        own = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        for shard, placed, mine in zip(shards, part.placed, own.split(sizes), strict=True):
            rows = local_of(shard).detach().movedim(placed.dim, 0).contiguous()
            mine[: rows.nbytes].copy_(rows.view(-1).view(torch.uint8))
        world = part.placed[0].world
        together = torch.empty(world * own.numel(), dtype=torch.uint8, device=device)
        collect = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # torch 2.13
        collect(together, own, group=part.placed[0].group)
        pieces = together.view(world, -1).split(sizes, dim=1)
        for index, placed, piece in zip(part.indices, part.placed, pieces, strict=True):
            target = self._buffers[index].movedim(placed.dim, 0)
            per_rank = (placed.per_rank, *target.shape[1:])
            filled = piece[:, : math.prod(per_rank) * target.element_size()].contiguous().view(target.dtype)
            target.copy_(filled.view(world * placed.per_rank, *target.shape[1:])[: placed.size])


def _flat_bytes(parameter: Any, placed: Placed) -> int:
    """What one rank contributes of a parameter: rows padded to those of the first rank, bytes to `_ALIGNED`."""
    rows = placed.per_rank * (int(parameter.numel()) // placed.size) * int(parameter.element_size())
    return -(-rows // _ALIGNED) * _ALIGNED


def _parts(shards: list[tuple[int, Placed]], parameters: list[Any]) -> Iterator[_Flat]:
    """In the order of the adapter, which is every rank's, as many as one collective may carry."""
    indices: list[int] = []
    placed: list[Placed] = []
    size = 0
    for index, where in shards:
        more = _flat_bytes(parameters[index], where)
        if indices and size + more > _FLAT:
            yield _Flat(placed, indices)
            indices, placed, size = [], [], 0
        indices.append(index)
        placed.append(where)
        size += more
    if indices:
        yield _Flat(placed, indices)
