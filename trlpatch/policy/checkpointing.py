"""Activation checkpointing of as many layers as memory needs; the others keep their activations.

Recomputing every layer is about a third of a training step's backward pass. Where the base weights are shared with the
engine, or the engine sleeps, the memory that the activations would take is often there.

transformers (4.53 and newer) asks each layer whether it is checkpointed (`GradientCheckpointingLayer`), so a hook
before a training forward can choose. What a layer computes is the same either way: losses and gradients do not change.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trlpatch.log import log_once

GIB = 2**30
MARGIN = GIB
"""Bytes that stay free, at least; a tenth of what activations may take if that is more (fragmentation)."""

_UNMEASURED = "every layer, until a step has been measured"


@dataclass(frozen=True)
class Memory:
    """One device's memory at one moment, in bytes.

    Attributes:
        allocated: held by tensors of this process.
        free: what tensors could still get: free on the device, or cached by torch.
        peak: the most that tensors held since torch's peak was reset last.
        retries: allocations that succeeded only after torch had given its cache back.
    """

    allocated: int
    free: int
    peak: int
    retries: int


def cuda_memory(device: Any = None) -> Memory | None:
    """Return the memory of a CUDA device; None where this process does not compute on one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    stats = torch.cuda.memory_stats(device)
    allocated = int(stats["allocated_bytes.all.current"])
    cached = int(stats["reserved_bytes.all.current"]) - allocated
    return Memory(
        allocated,
        int(torch.cuda.mem_get_info(device)[0]) + cached,
        int(stats["allocated_bytes.all.peak"]),
        int(stats["num_alloc_retries"]),
    )


class AutoCheckpointing:
    """Chooses before each training forward of one model which of its checkpointed layers are recomputed.

    The first micro-step measures: one layer keeps its activations, and the peak says what everything else takes. From
    the second on, layers are left alone from the last to the first while their activations fit into free memory. Both
    figures are kept per token, so that a longer batch checkpoints more layers.

    Args:
        model: the transformers model; its checkpointing is switched on and off by whom it belongs to (TRL).
        memory: reads the device; None from it leaves every layer checkpointed.
        reserved: bytes of free memory that belong to somebody else (an engine's weights that sleep).
    """

    def __init__(
        self,
        model: Any,
        *,
        memory: Callable[[], Memory | None] = cuda_memory,
        reserved: Callable[[], int] = lambda: 0,
    ) -> None:
        self._memory = memory
        self._reserved = reserved
        self._layer_per_token: float | None = None
        self._rest_per_token: float | None = None
        self._before: Memory | None = None
        self._tokens = 0
        self._retries = 0
        self._share = 1.0
        self._layers: list[Any] | None = None
        self._flagged: list[Any] = []
        self._kept: list[Any] = []
        self._measuring: list[Any] = []
        self.description = _UNMEASURED
        self._hook = model.register_forward_pre_hook(self._choose, with_kwargs=True)

    def remove(self) -> None:
        """Leave checkpointing to the model again."""
        for hook in (self._hook, *self._measuring):
            hook.remove()
        if any(part.gradient_checkpointing for part in self._flagged):  # `_keep` leaves one flag while it is on
            for layer in self._kept:
                layer.gradient_checkpointing = True

    def _choose(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        if not (model.training and torch.is_grad_enabled()):
            return
        layers = self._checkpointed(model)
        now = self._memory() if layers else None
        if now is None:
            return
        tokens = _tokens(args, kwargs)
        self._conclude(now)
        if self._layer_per_token is None or self._rest_per_token is None:
            self._before, self._tokens = now, tokens
            self._keep([layers[-1]])
            self._measure(layers[-1])
            return
        room = now.free - self._reserved() - self._rest_per_token * tokens
        room -= max(MARGIN, room / 10)
        fitting = int(max(0.0, room) * self._share / (self._layer_per_token * tokens))
        self._keep(layers[max(0, len(layers) - fitting) :])
        unmeasured = self.description == _UNMEASURED
        self.description = (
            f"{len(layers) - len(self._kept)} of {len(layers)} layers at {tokens} tokens "
            f"({self._layer_per_token * tokens / GIB:.2f} GiB a layer, {now.free / GIB:.1f} GiB free)"
        )
        if unmeasured:
            log_once(model, f"activation checkpointing: {self.description}")

    def _checkpointed(self, model: Any) -> list[Any]:
        """The layers that the model's owner has checkpointed, also those kept last time; none when it is off."""
        if self._layers is None:
            # Without the model itself: it is the key under which this object is kept.
            parts = (part for part in model.modules() if part is not model)
            self._flagged = [part for part in parts if hasattr(part, "gradient_checkpointing")]
            self._layers = checkpointable_layers(model)
        if not any(part.gradient_checkpointing for part in self._flagged):
            self._kept = []
        for layer in self._kept:
            layer.gradient_checkpointing = True
        self._kept = []
        return [layer for layer in self._layers if layer.gradient_checkpointing]

    def _keep(self, layers: list[Any]) -> None:
        own = self._layers or []
        if len(layers) == len(own) and not any(
            part.gradient_checkpointing for part in self._flagged if part not in own
        ):
            layers = layers[1:]  # one flag has to stay: that it is set says that checkpointing is on
        self._kept = layers
        for layer in layers:
            layer.gradient_checkpointing = False

    def _measure(self, layer: Any) -> None:
        """See what a layer that keeps its activations takes."""
        start: list[int] = []

        def before(*_: Any) -> None:
            found = self._memory()
            if found is not None:
                start.append(found.allocated)

        def after(*_: Any) -> None:
            found = self._memory()
            self._stop_measuring()
            if found is not None and start:
                self._layer_per_token = max(1.0, (found.allocated - start[0]) / self._tokens)

        self._stop_measuring()  # a forward that failed has left its hooks
        self._measuring = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    def _stop_measuring(self) -> None:
        for hook in self._measuring:
            hook.remove()
        self._measuring = []

    def _conclude(self, now: Memory) -> None:
        """Read what the micro-step before this one took; called at the start of the next."""
        if self._rest_per_token is not None and now.retries > self._retries:
            self._share *= 0.75  # torch had to give its cache back on the way: too close to the limit
        self._retries = now.retries
        if self._before is None or self._layer_per_token is None or self._rest_per_token is not None:
            return
        # Where the peak is older than the step this is more than the step took, never less.
        took = now.peak - self._before.allocated - self._layer_per_token * self._tokens
        self._rest_per_token = max(0.0, took) / self._tokens


def checkpointable_layers(model: Any) -> list[Any]:
    """Return the model's layers that can be checkpointed one by one, in its order; none below transformers 4.53."""
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:
        return []
    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args):
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape) >= 2:
            return max(1, int(shape[0]) * int(shape[1]))
    return 1


_automatic: weakref.WeakKeyDictionary[Any, AutoCheckpointing] = weakref.WeakKeyDictionary()


def set_auto_checkpointing(
    model: Any, *, on: bool, memory: Callable[[], Memory | None] = cuda_memory, reserved: Callable[[], int] = lambda: 0
) -> None:
    """Switch the choice of layers on or off for a transformers model; switching twice does nothing."""
    standing = _automatic.pop(model, None)
    if standing is not None:
        standing.remove()
    if on:
        _automatic[model] = AutoCheckpointing(model, memory=memory, reserved=reserved)


def auto_checkpointing(model: Any) -> AutoCheckpointing | None:
    """Return what chooses the model's checkpointed layers; None where all are recomputed, or none."""
    return _automatic.get(model)


def describe() -> list[str]:
    """Return a line per live model whose layers are chosen, for `trlpatch.status()`."""
    return [f"{type(model).__name__}: {chosen.description}" for model, chosen in list(_automatic.items())]
