"""Change detection: has the adapter changed since it was handed over?

Answered by content, because torch's version counters do not tell: fused AdamW, the default of transformers, writes
without moving them, and so do `param.data` and optimizers of other libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trlpatch.policy.adapter import LoraView, LoraWeights
from trlpatch.policy.sharding import local_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK = 2**20  # elements gathered at a time: 20 MiB with their keys and products


def fingerprint(view: LoraView) -> tuple[object, ...]:
    """Equal as long as the active adapter is unchanged; of a sharded one, the part in this process.

    Computing one starts three kernels per million parameters and waits for none of them; comparing two waits.
    """
    marks: list[object] = [view.active, view.disabled]
    for adapter in view.active:
        weights = view.weights(adapter)
        marks += [weights.paths, weights.scalings, weights.addresses, *content(weights)]
    return tuple(marks)


def content(weights: LoraWeights) -> list[Sums]:
    """Sums of an adapter's parameters, one per device and element size."""
    import torch

    sums: ContentSums | None = weights.derived.get("content")
    if sums is None:
        tensors = [local_of(weight) for weight in weights.parameters]
        with torch.inference_mode(False):
            sums = ContentSums(tensors)
        if all(weight.is_contiguous() for weight in tensors):
            weights.derived["content"] = sums  # it looks at the weights' own storage
    return sums.now()


class Sums:
    """Sums of the parameters' bits on one device; equal to others of the same content."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def __eq__(self, other: object) -> bool:
        import torch

        if not isinstance(other, Sums):
            return NotImplemented
        one, two = self._values, other._values
        return bool(one.device == two.device and torch.equal(one, two))


@dataclass(frozen=True)
class _Chunk:
    """Flat integer views of some weights, which one kernel gathers in a buffer."""

    parts: list[Tensor]
    buffer: Tensor
    keys: Tensor
    products: Tensor

    def sum(self) -> Tensor:
        """Sum the elements' bits, each times a number of its place, modulo 2**64.

        Moves that cancel out in a plain sum, or in sums of rows and of columns, do not here.
        """
        import torch

        torch.cat(self.parts, out=self.buffer)
        torch.mul(self.buffer, self.keys, out=self.products)
        return self.products.sum()


class ContentSums:
    """Sums over some tensors, to be made again and again while they stay where they are.

    Its buffers can be written outside of inference mode only when it was not made in it.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        import torch

        with torch.no_grad():
            self._groups = _chunks(tensors)

    def numbers(self) -> list[int]:
        """Sum as `now` does, and wait for the results."""
        import torch

        with torch.no_grad():
            sums = [[chunk.sum() for chunk in chunks] for chunks in self._groups]
        return [int(number) for some in sums for number in (torch.stack(some).tolist() if some[1:] else some)]

    def now(self) -> list[Sums]:
        """Sum what the tensors hold at this moment; one result per device and element size."""
        import torch

        with torch.no_grad():
            return [Sums(torch.stack([chunk.sum() for chunk in chunks])) for chunks in self._groups]


def as_integers(tensor: Tensor) -> Tensor:
    """A view of the tensor's bits as integers of the same size and shape."""
    import torch

    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integer[tensor.element_size()])


def _chunks(tensors: list[Tensor]) -> list[list[_Chunk]]:
    """The weights by device and element size, in pieces of at most `_CHUNK` elements that share one buffer."""
    alike: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in tensors:
        bits = as_integers(tensor.detach().contiguous()).view(-1)
        alike.setdefault((tensor.device, tensor.element_size()), []).extend(bits.split(_CHUNK))
    return [_packed(parts) for parts in alike.values()]


def _packed(parts: list[Tensor]) -> list[_Chunk]:
    import torch

    pieces: list[tuple[list[Tensor], int]] = []
    for part in parts:
        size = part.numel()
        if pieces and pieces[-1][1] + size <= _CHUNK:
            together, before = pieces[-1]
            pieces[-1] = ([*together, part], before + size)
        else:
            pieces.append(([part], size))
    size = max(size for _, size in pieces)
    buffer, keys = parts[0].new_empty(size), _keys(parts[0].device)[:size]
    products = torch.empty_like(keys)
    return [_Chunk(together, buffer[:size], keys[:size], products[:size]) for together, size in pieces]


@cache
def _keys(device: torch.device) -> Tensor:
    """Odd numbers without a pattern, the same at every call: 8 MiB of each device, whose making takes 10 ms."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return (torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator) * 2 + 1).to(device)
