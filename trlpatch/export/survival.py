"""How much of what an adapter does to the weights is left when they are rounded to a dtype.

Neighbours among 16-bit weights are 2^-8 of the weight apart in bfloat16, 2^-11 in float16, and reinforcement learning
moves most weights by less. With D the change by the adapter and E the error of rounding the sum once,
`lost` is |E| / |D| (Frobenius norms over all layers): 0 keeps the adapter, 1 is as far from it as the base model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trlpatch.errors import CannotExport

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROWS = 128
"""Rows of a tensor that the statistic looks at, at most about, evenly spaced."""


@dataclass
class Survival:
    """Sums over the changed tensors of an export, one entry per dtype that was looked at."""

    stored: torch.dtype
    """What the export is written in."""
    squares: dict[str, float] = field(default_factory=dict)
    """Dtype -> the sum of E squared; "" -> that of D."""
    still: dict[str, int] = field(default_factory=dict)
    """Dtype -> weights that D moves and that are stored as without it; "" -> weights that D moves."""
    overflow: dict[str, int] = field(default_factory=dict)
    """Dtype -> weights that are finite and do not fit."""
    layers: dict[str, float] = field(default_factory=dict)
    """Name of a tensor -> its own `lost` in the stored dtype."""

    def add(self, name: str, base: Tensor, merged: Tensor) -> None:
        """Count one tensor, or `sample`s of it: float32, without the adapter and with it."""
        import torch

        delta = merged - base
        mine = _square(delta)
        self.squares[""] = self.squares.get("", 0.0) + mine
        moved = delta != 0
        self.still[""] = self.still.get("", 0) + int(moved.sum())
        for dtype in dict.fromkeys((self.stored, torch.bfloat16, torch.float16)):
            key = str(dtype).removeprefix("torch.")
            rounded = merged.to(dtype).to(torch.float32)
            error = _square(rounded - merged)
            if not math.isfinite(error):
                self.overflow[key] = self.overflow.get(key, 0) + int((~torch.isfinite(rounded)).sum())
                continue
            self.squares[key] = self.squares.get(key, 0.0) + error
            still = moved & (rounded == base.to(dtype).to(torch.float32))
            self.still[key] = self.still.get(key, 0) + int(still.sum())
            if dtype == self.stored:
                self.layers[name] = math.sqrt(error / mine) if mine else 0.0

    def lost(self, dtype: torch.dtype | None = None) -> float | None:
        """|E| / |D| in a dtype (None: the stored one); None where nothing moves, or where values do not fit."""
        key = str(dtype or self.stored).removeprefix("torch.")
        if not self.squares.get("") or key in self.overflow or key not in self.squares:
            return None
        return math.sqrt(self.squares[key] / self.squares[""])

    def unmoved(self, dtype: torch.dtype | None = None) -> float:
        """The share of the weights that the adapter moves and that are stored as if it did not."""
        key = str(dtype or self.stored).removeprefix("torch.")
        return self.still.get(key, 0) / max(1, self.still.get("", 0))

    @property
    def kept(self) -> float | None:
        """1 - lost, not below 0."""
        lost = self.lost()
        return None if lost is None else max(0.0, 1.0 - lost)

    def sentence(self) -> str:
        """What a user is told."""
        import torch

        lost, name = self.lost(), str(self.stored).removeprefix("torch.")
        if lost is None:
            return "the adapter changes no weight: the export is the base model"
        text = f"{name} keeps {max(0.0, 1.0 - lost):.0%} of the adapter's change of the weights"
        if self.unmoved() >= 0.005:
            text += f" ({self.unmoved():.0%} of the weights that it moves round to what they were)"
        finer = self.lost(torch.float16)
        if lost > 0.05 and self.stored == torch.bfloat16 and finer is not None and finer < min(lost, 1.0) / 2:
            text += f"; float16 would keep {max(0.0, 1.0 - finer):.0%} (dtype float16)"
        elif lost > 0.05 and self.stored != torch.float32:
            text += "; float32 keeps all of it (dtype float32), and so does the adapter alone"
        return text


def require_finite(name: str, merged: Tensor, dtype: torch.dtype) -> None:
    """Raise CannotExport where a value is not finite, or does not fit into `dtype`."""
    import torch

    if not merged.numel():
        return
    least, most = (float(one) for one in torch.aminmax(merged))  # either is NaN where one value is
    largest = max(-least, most) if math.isfinite(least) and math.isfinite(most) else math.inf
    if not math.isfinite(largest):
        raise CannotExport(
            f"merging into {name!r}: values that are not finite; the adapter or the base weights are broken (a "
            "training run that diverged?)"
        )
    if largest > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise CannotExport(
            f"writing {name!r} in {kind}: its largest value is {largest:.3g}, and {kind} ends at "
            f"{torch.finfo(dtype).max:.3g}; use --dtype bfloat16"
        )


def sample(tensor: Tensor) -> Tensor:
    """Rows of a matrix for `Survival.add`; the whole of what is small or no matrix."""
    rows = tensor.shape[0] if tensor.dim() > 1 else 0
    return tensor if rows <= _ROWS else tensor[:: -(-rows // _ROWS)]


def _square(tensor: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
