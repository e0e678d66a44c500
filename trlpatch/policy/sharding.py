"""Sharded parameters (FSDP2's DTensor, DeepSpeed ZeRO-3): which are, and the part of them in this process.

Nothing here is a collective: one rank alone may ask.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.options import read_launcher

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def sharded_by(tensor: object) -> str | None:
    """What has split a parameter over ranks, "FSDP2" or "DeepSpeed ZeRO-3"; None for a whole one."""
    if hasattr(tensor, "full_tensor"):
        return "FSDP2"
    return "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else None


def split_over_ranks(base: Any) -> str | None:
    """What has split a model's parameters over ranks, FSDP1 as well; None when all of them are whole."""
    for module in base.modules() if callable(getattr(base, "modules", None)) else ():
        if type(module).__name__ == "FullyShardedDataParallel":
            return "FSDP"
        for parameter in module._parameters.values():
            if parameter is not None and (by := sharded_by(parameter)) is not None:
                return by
    return None


def filled_later() -> bool:
    """Will accelerate bring this rank's weights when it shards the model? What it has until then is not initialised.

    transformers loads a checkpoint on the first rank of each host only, under FSDP with
    `fsdp_cpu_ram_efficient_loading`, which `accelerate launch` switches on by default.
    """
    wanted = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    asked = all(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in wanted)
    return asked and read_launcher("LOCAL_RANK", 0) != 0


def shape_of(tensor: Any) -> torch.Size:
    """The shape of the whole parameter; a ZeRO-3 parameter that is released says [0] itself."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def local_of(tensor: Any) -> Tensor:
    """The part of a parameter that is in this process: of ZeRO-3 flat and padded; a whole parameter itself.

    A DTensor's own `data_ptr()` is 0. ZeRO-3's partition is current also while the parameter is gathered.
    """
    import torch

    if hasattr(tensor, "full_tensor"):
        with torch.no_grad():
            part: Tensor = tensor.to_local()
        return part
    whole: Tensor = tensor
    return getattr(whole, "ds_tensor", whole)


def piece_of(tensor: Any) -> tuple[int, Tensor] | None:
    """(offset in the flattened whole parameter, what is here of it, flat); None where it is in several pieces."""
    if hasattr(tensor, "full_tensor"):
        placed = sharded_once(tensor)
        if placed is None or placed.dim != 0:
            return None
        flat = local_of(tensor).reshape(-1)
        return min(placed.rank * placed.per_rank, placed.size) * math.prod(tensor.shape[1:]), flat
    if hasattr(tensor, "ds_id"):
        from torch import distributed

        part, size = tensor.ds_tensor, int(tensor.ds_numel)
        start = min(distributed.get_rank(tensor.ds_process_group) * part.numel(), size)
        return start, part.detach().view(-1)[: size - start]
    return 0, tensor.detach().reshape(-1)


def unreadable_reason(tensor: Any) -> str | None:
    """Why a sharded parameter cannot be put together; None when it can."""
    if hasattr(tensor, "full_tensor"):
        if any(placement.is_partial() for placement in tensor.placements):
            return "its parameters are DTensors of partial sums"
        return "its parameters hold no data in this process" if local_of(tensor).is_meta else None
    status = getattr(getattr(getattr(tensor, "ds_tensor", None), "status", None), "name", "NOT_AVAILABLE")
    return None if status == "AVAILABLE" else "DeepSpeed ZeRO-3 keeps its parameters out of memory (NVMe)"


@dataclass(frozen=True)
class Placed:
    """Where a DTensor that is split along one dimension, over one dimension of its mesh, has its parts."""

    dim: int
    group: Any
    world: int
    rank: int
    size: int
    """Of `dim`."""

    @property
    def per_rank(self) -> int:
        """Rows of the first ranks: the last ones have fewer, or none."""
        return -(-self.size // self.world)


def sharded_once(tensor: Any) -> Placed | None:
    """None for what fully_shard alone does not make: two dimensions split, or a strided split (beside TP)."""
    from torch.distributed.tensor import Shard

    split = [(i, placement) for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(split) != 1 or type(split[0][1]) is not Shard:
        return None
    (index, placement), mesh = split[0], tensor.device_mesh
    dim = placement.dim % tensor.dim()
    return Placed(dim, mesh.get_group(index), mesh.size(index), mesh.get_local_rank(index), tensor.shape[dim])
