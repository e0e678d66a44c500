"""Has the adapter changed since it was handed over?

Answered by content, because torch's version counters do not tell: fused AdamW, the default of transformers, writes
without moving them, and so do `param.data` and optimizers of other libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trlpatch.policy.adapter import LoraView, LoraWeights

_COLUMNS = 4096
_CHUNK = 2048 * _COLUMNS  # elements gathered at a time: 32 MiB of float32


def fingerprint(view: LoraView) -> tuple[object, ...]:
    """Equal as long as the active adapter is unchanged.

    Computing one on a GPU starts some ten kernels per 100 MB and waits for none of them; comparing two waits.
    """
    marks: list[object] = [view.active, view.disabled]
    for adapter in view.active:
        weights = view.weights(adapter)
        marks += [weights.paths, weights.scalings, weights.addresses]
        marks += [Sums(sums) for sums in _sums(weights)]
    return tuple(marks)


class Sums:
    """Sums of the parameters' bits on one device; equal to others of the same content."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: Any) -> None:
        self._values = values

    def __eq__(self, other: object) -> bool:
        import torch

        if not isinstance(other, Sums):
            return NotImplemented
        one, two = self._values, other._values
        return bool(one.device == two.device and torch.equal(one, two))


@dataclass(frozen=True)
class _Chunk:
    """Flat integer views of some weights, which one kernel gathers in a buffer [rows, _COLUMNS]."""

    parts: list[Any]
    """With zeros at the end that fill the last row."""
    buffer: Any

    def sums(self) -> list[Any]:
        """Of the rows and of the columns, int64.

        A matrix of bits, not a sum per tensor: two elements that move by one bit in opposite directions cancel in
        a row, but not in their columns as well.
        """
        import torch

        torch.cat(self.parts, out=self.buffer.view(-1))
        return [self.buffer.sum(dim, dtype=torch.int64) for dim in (0, 1)]


def _sums(weights: LoraWeights) -> list[Any]:
    """The sums of all weights, one tensor per device and element size."""
    import torch

    groups = weights.derived.get("chunks")
    if groups is None:
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            groups = _chunks([*weights.a, *weights.b])
        if all(weight.is_contiguous() for weight in (*weights.a, *weights.b)):
            weights.derived["chunks"] = groups  # they look at the weights' own storage
    with torch.no_grad():
        return [torch.cat([part for chunk in chunks for part in chunk.sums()]) for chunks in groups]


def as_integers(tensor: Any) -> Any:
    """A view of the tensor's bits as integers of the same size and shape."""
    import torch

    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integer[tensor.element_size()])


def _chunks(tensors: list[Any]) -> list[list[_Chunk]]:
    """The weights by device and element size, in pieces of at most `_CHUNK` elements that share one buffer."""
    alike: dict[tuple[Any, int], list[Any]] = {}
    for tensor in tensors:
        bits = as_integers(tensor.detach().contiguous()).view(-1)
        alike.setdefault((tensor.device, tensor.element_size()), []).extend(bits.split(_CHUNK))
    return [_packed(parts) for parts in alike.values()]


def _packed(parts: list[Any]) -> list[_Chunk]:
    pieces: list[tuple[list[Any], int]] = []
    for part in parts:
        size = part.numel()
        if pieces and pieces[-1][1] + size <= _CHUNK:
            together, before = pieces[-1]
            pieces[-1] = ([*together, part], before + size)
        else:
            pieces.append(([part], size))
    rows = [-(-size // _COLUMNS) for _, size in pieces]
    shared = parts[0].new_empty(max(rows), _COLUMNS)
    fill = parts[0].new_zeros(_COLUMNS)
    return [
        _Chunk([*together, fill[: count * _COLUMNS - size]], shared[:count])
        for (together, size), count in zip(pieces, rows, strict=True)
    ]
