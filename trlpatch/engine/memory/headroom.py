"""Does training leave room for the engine's weights? Then they need not make way for it.

Measured, not estimated: from a sleep to the wake after it, if the policy's parameters moved in between (so a whole
optimizer step lies there: forward, backward, optimizer state).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from trlpatch.engine.memory import device
from trlpatch.engine.memory.device import GIB

MARGIN = 2 * GIB
"""Bytes that must stay free beside the weights, or as much again as the phase took, whichever is more: completions
get longer while a policy learns.
"""
_TOO_LITTLE = MARGIN // 2
_SAMPLED = 256
"""Elements of a parameter that are looked at."""


@dataclass(frozen=True)
class _Phase:
    free: int
    peak: int
    weights: int
    weights_unmapped: bool
    model: weakref.ref[Any] | None
    content: tuple[Any, ...]


class HeadroomMonitor:
    """The measurements of one engine. `suffices` is True while its weights may stay mapped during training."""

    def __init__(self) -> None:
        self.suffices = False
        self.left: int | None = None
        """The least memory that was free beside the weights during the last phase measured, in bytes."""
        self._phase: _Phase | None = None
        self._settled = False

    def begin(self, *, weights: int | None, weights_unmapped: bool, model: Any) -> None:
        """The engine has just gone to sleep. `weights` is the size of its pool in bytes, None when unknown."""
        self._phase = None
        free = device.free_bytes()
        if weights is None or free is None or self._settled:
            return
        content = sample(model) if weights_unmapped else ()
        self._phase = _Phase(free, device.reserved_bytes()[1], weights, weights_unmapped, _reference(model), content)

    def end(self) -> str | None:
        """The engine is about to wake; what was concluded, if that is new.

        Memory that torch held at its peak counts as taken even if it was returned since. A peak that was reset during
        the phase tells nothing, and neither does a phase without an optimizer step.
        """
        phase, self._phase = self._phase, None
        free, (reserved, peak) = device.free_bytes(), device.reserved_bytes()
        if phase is None or free is None or peak < phase.peak:
            return None
        lowest = min(phase.free, free - (peak - reserved))
        self.left = lowest - (phase.weights if phase.weights_unmapped else 0)
        if phase.weights_unmapped:
            return self._may_stay(phase, taken=phase.free - lowest)
        if self.left >= _TOO_LITTLE:
            return None
        self.suffices, self._settled = False, True
        return f"training left {self.left / GIB:.1f} GiB free beside the engine's weights: they make way again"

    def _may_stay(self, phase: _Phase, *, taken: int) -> str | None:
        model = None if phase.model is None else phase.model()
        if model is None or self.left is None or sample(model) == phase.content:
            return None
        if self.left < max(MARGIN, taken):
            return None
        self.suffices = True
        return (
            f"a training step took {taken / GIB:.1f} GiB and leaves {self.left / GIB:.1f} GiB free beside the "
            "engine's weights: from now on only the KV cache makes way for training"
        )


def _reference(model: Any) -> weakref.ref[Any] | None:
    return None if model is None else weakref.ref(model)


def sample(model: Any) -> tuple[float, ...]:
    """Some of the model's trainable weights, a sum a parameter: another after an optimizer step.

    By content, for the reason that `trlpatch.policy.change_detection` gives: fused AdamW moves no version counter.
    """
    if model is None:
        return ()
    import torch

    by_device: dict[Any, list[Any]] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                some = parameter.detach().reshape(-1)[:_SAMPLED].sum(dtype=torch.float64)
                by_device.setdefault(some.device, []).append(some)
        return tuple(value for sums in by_device.values() for value in torch.stack(sums).tolist())
