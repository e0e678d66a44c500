"""Pack an adapter into one buffer: one copy from the device, one object in Ray's store, one copy to each engine.

Ray stores a torch tensor with its whole storage, object by object; a NumPy array is written to shared memory once and
read there by every actor of a node.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter_tensors import AdapterTensors

if TYPE_CHECKING:
    import torch

_INTEGERS = {2: "int16", 4: "int32", 8: "int64"}
"""NumPy has no bfloat16: the bits travel as integers of the same size."""


@dataclass(frozen=True)
class PackedAdapter:
    """The tensors of an `AdapterTensors`, one after another, in one dtype."""

    buffer: Any
    """`numpy.ndarray` of integers, one per element."""
    dtype: str
    """As torch calls it, "bfloat16" for one."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rank: int
    targets: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """What travels."""
        return int(self.buffer.nbytes)

    def unpack(self, device: Any = "cpu") -> AdapterTensors:
        """The tensors, views of one buffer on `device`; on the CPU of the message itself, only to be read."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # nor is it written
            whole = torch.from_numpy(self.buffer)
        whole = whole.to(device).view(getattr(torch, self.dtype))
        sizes = [_product(shape) for shape in self.shapes]
        parts = whole.split(sizes)
        tensors = {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}
        return AdapterTensors(tensors, self.rank, self.targets)


def pack(adapter: AdapterTensors, dtype: torch.dtype) -> PackedAdapter:
    """Round to `dtype`, the engines' LoRA dtype, and copy to host memory; waits for the device.

    An engine rounds to that dtype itself: rounding first changes nothing but what travels.
    """
    import torch

    with torch.no_grad():
        flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in adapter.tensors.values()])
        bits = flat.view(getattr(torch, _INTEGERS[flat.element_size()])).cpu()
    return PackedAdapter(
        bits.numpy(),
        str(dtype).removeprefix("torch."),
        tuple(adapter.tensors),
        tuple(tuple(tensor.shape) for tensor in adapter.tensors.values()),
        adapter.rank,
        adapter.targets,
    )


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
