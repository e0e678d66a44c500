"""Named tensors in parts of a limited size, which keep nothing alive but what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK_BYTES = 2**28


def chunks(
    weights: Iterable[tuple[str, Tensor]], limit: int = CHUNK_BYTES, device: torch.device | str = "cpu"
) -> Iterator[list[tuple[str, Tensor]]]:
    """Copies on `device`, at most `limit` bytes a part but for a tensor that is larger.

    Copies, since a view of a large storage would travel with all of it, and since whoever gives the tensors may write
    them again: TRL takes an adapter out of them right after it has pushed them.

    Raises:
        ValueError: a tensor has no data in this process (sharded, or on the meta device).
    """
    import torch

    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        with torch.no_grad():
            if tensor.is_meta or hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id"):
                raise ValueError(f"{name!r} is sharded or has no data in this process; expected whole tensors")
            whole = tensor.detach()
            own = torch.empty(whole.shape, dtype=whole.dtype, device=device).copy_(whole)
        if part and size + own.nbytes > limit:
            yield part
            part, size = [], 0
        part.append((name, own))
        size += own.nbytes
    if part:
        yield part
