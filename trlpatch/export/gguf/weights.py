"""The weights of a GGUF: float32 rows of an ExportSource, in any order, as often as they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trlpatch.export.source import ExportSource, ExportTensor

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Weights:
    """Rows of the tensors of a source. What an adapter changes is merged whole, and kept until another is asked."""

    def __init__(self, source: ExportSource) -> None:
        self._tensors = {one.name: one for one in source.tensors}
        self._last: tuple[str, Tensor] | None = None

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The tensors of the exported checkpoint; tied ones once."""
        return {name: one.shape for name, one in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension as float32 on the CPU; a scalar has one row."""
        import torch

        tensor = self._tensors[name]
        if not tensor.adapted and tensor.part is None:
            self._last = None
            return tensor.base.rows(start, stop).to(torch.float32)
        found = self._whole(tensor)
        return found[start:stop] if found.dim() else found

    def _whole(self, tensor: ExportTensor) -> Tensor:
        import torch

        if self._last is None or self._last[0] != tensor.name:
            self._last = None  # not two at once
            self._last = (tensor.name, tensor.read().to(torch.float32))
        return self._last[1]
