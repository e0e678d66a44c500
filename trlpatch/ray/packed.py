"""Pack an adapter into one buffer: one copy from the device, one object in Ray's store, one copy to each engine.

Ray stores a torch tensor with its whole storage, object by object; a NumPy array is written to shared memory once and
read there by every actor of a node.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.adapter_tensors import AdapterTensors, tensor_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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


def pack(weights: LoraWeights, dtype: torch.dtype) -> PackedAdapter:
    """Scale and round to `dtype`, the engines' LoRA dtype, and copy to host memory; waits for the device.

    As `adapter_tensors`, padded with zeros to one rank and with each scaling in its B, multiplied in float32. An
    engine rounds to that dtype itself: rounding first changes nothing but what travels. The buffer is written over by
    the next `pack` of these weights: `ray.put` has copied it by then.
    """
    packers: dict[torch.dtype, _Packer] = weights.derived.setdefault("packers", {})
    if dtype not in packers:
        packers[dtype] = _Packer(weights, dtype)
    return packers[dtype].pack(weights)


class _Packer:
    """Buffers for an adapter's tensors, on their device and in the host's memory, allocated once.

    Fresh memory costs a page fault for every 4 KiB, and a copy from a GPU to memory that is not pinned goes through
    the driver's own buffers: for 80 MB each takes longer than the copy.
    """

    def __init__(self, weights: LoraWeights, dtype: torch.dtype) -> None:
        import torch

        self._dtype, rank = dtype, weights.rank
        shapes = [shape for a, b in zip(weights.a, weights.b, strict=True)
                  for shape in ((rank, a.shape[1]), (b.shape[0], rank))]  # fmt: skip
        with torch.inference_mode(False):
            self._flat = weights.a[0].new_zeros(sum(map(_product, shapes)), dtype=dtype, requires_grad=False)
            bits = self._flat.view(getattr(torch, _INTEGERS[dtype.itemsize]))
            self._host = bits if bits.device.type == "cpu" else torch.empty_like(bits, device="cpu", pin_memory=True)
        self._bits = bits
        parts = [part.view(shape) for part, shape in zip(self._flat.split(list(map(_product, shapes))), shapes,
                                                         strict=True)]  # fmt: skip
        self._a = [part[: a.shape[0]] for part, a in zip(parts[::2], weights.a, strict=True)]
        self._b = [part[:, : b.shape[1]] for part, b in zip(parts[1::2], weights.b, strict=True)]
        names = tuple(name for path in weights.paths for name in tensor_names(path))
        self._about = names, tuple(shapes), rank, weights.targets

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        import torch

        names, shapes, rank, targets = self._about
        with torch.no_grad():
            b: Sequence[Tensor] = weights.b
            if any(scaling != 1.0 for scaling in weights.scalings):
                b = torch._foreach_mul([one.to(torch.float32) for one in b], list(map(float, weights.scalings)))
            torch._foreach_copy_([*self._a, *self._b], [*weights.a, *b])
            if self._host is not self._bits:
                self._host.copy_(self._bits)
        return PackedAdapter(self._host.numpy(), str(self._dtype).removeprefix("torch."), names, shapes, rank, targets)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
