"""Adapter sync by copying into the buffers that the engine's kernels and CUDA graphs read."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.adapter_sync.foreach_copy import ForeachCopy
from trlpatch.engine.adapter_sync.fused_copy import FusedCopy, NotFused
from trlpatch.engine.adapter_sync.registration import Registration
from trlpatch.engine.adapter_sync.slots import Slots, Unexpected, find_slots
from trlpatch.engine.adapter_sync.staging import Staging, Target
from trlpatch.engine.protocols import AdapterManager, LoraManager, LoraModel, LoraRequest, RolloutEngine
from trlpatch.log import log_once
from trlpatch.policy.adapter import LoraWeights

if TYPE_CHECKING:
    import torch


class Pending(Protocol):
    """One copy of an adapter that was started."""

    def wait(self) -> int:
        """Wait until it has arrived; another number when the sources' bits are."""

    def base_glance(self, spots: object) -> object | None:
        """See CopyUnderway."""


@dataclass
class _Registered:
    """The adapter as vLLM's registry has it, and the way into its slot."""

    lora: LoraModel
    staging: Staging
    slots: Slots
    slot: int
    targets: list[Target]
    """Of every A, then of every B, in the order of the training model."""
    copy: FusedCopy | ForeachCopy
    handed_over: tuple[weakref.ref[LoraWeights], int] | None = None
    """The weights that were copied last, and what the copy said of their contents."""


class BufferCopy:
    """Registers the adapter once, under one id, and overwrites the engine's LoRA buffers on every later publish.

    vLLM allocates these buffers once and swaps adapters by copying into them, also under captured CUDA graphs; this is
    the same copy, for all layers at once. When modules or ranks change, or vLLM has dropped the adapter, it is
    registered again, which zeroes what is no longer adapted. The engine must be idle; device work is queued on the
    current stream, which in-process vLLM computes on.

    Publishing is the check, too: everything is copied each time, and the request stays as long as the contents do, so
    that cached prefixes are good for more than one rollout. `start` copies what was handed over last while the caller
    looks whether it is still what there is to hand over; where it is not, what it has written is written over.

    Where the buffers are not as expected every version is registered anew (`Registration`); `description` says why.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = weakref.ref(engine)
        self._current: _Registered | None = None
        self._request: LoraRequest | None = None
        self._fallback: Registration | None = None

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""
        return "in place" if self._fallback is None else self._fallback.description

    @property
    def compares(self) -> bool:
        """Unless every version is registered anew."""
        return self._fallback is None

    def publish(self, weights: LoraWeights) -> LoraRequest:
        """Write the adapter into the engine's buffers; see AdapterSync."""
        import torch

        if self._fallback is not None:
            return self._fallback.publish(weights)
        worker = registry.worker_of(self._engine())
        current = self._reusable(worker, weights)
        if current is None:
            with torch.inference_mode():  # buffers may be inference tensors; trained ones are only read
                try:
                    current = self._register(worker, weights)
                except Unexpected as reason:
                    return self._fall_back(worker, str(reason)).publish(weights)
        return self._conclude(current, weights, self._start(current, weights))

    def start(self) -> Underway | None:
        """Copy the tensors that were handed over last; see AdapterSync."""
        current = self._current
        if current is None or current.handed_over is None:
            return None
        weights = current.handed_over[0]()
        if weights is None:
            return None
        manager = registry.worker_of(self._engine())._adapter_manager
        if (
            manager.get_adapter(registry.LIVE_ID) is not current.lora
            or manager.lora_index_to_id[current.slot] != registry.LIVE_ID
        ):
            return None
        return Underway(self, current, weights, current.slot, self._start(current, weights))

    def finish(self, underway: Underway, weights: LoraWeights) -> LoraRequest | None:
        """See CopyUnderway."""
        current, finished, underway.finished = self._current, underway.finished, True
        if finished or current is None or current is not underway.current or weights is not underway.weights:
            return None
        if self._reusable(registry.worker_of(self._engine()), weights) is not current or current.slot != underway.slot:
            return None
        return self._conclude(current, weights, underway.pending)

    def _start(self, current: _Registered, weights: LoraWeights) -> Pending:
        self._current = None  # should a copy fail, the next publish starts over
        pending = _start(current, weights)
        self._current = current
        return pending

    def _conclude(self, current: _Registered, weights: LoraWeights, pending: Pending) -> LoraRequest:
        self._current = None
        changes = pending.wait()
        before, current.handed_over = current.handed_over, (weakref.ref(weights), changes)
        # Other weights objects have other scalings, perhaps, which are no part of the contents.
        if self._request is None or before is None or before[0]() is not weights or before[1] != changes:
            self._request = registry.fresh_request(registry.NOWHERE, lora_id=registry.LIVE_ID)
        self._current = current
        return self._request

    def holds(self, request: LoraRequest) -> bool:
        """Tell whether the request is the newest one, and its adapter still registered."""
        if self._fallback is not None:
            return self._fallback.holds(request)
        current = self._current
        if current is None or request is not self._request:
            return False
        manager = registry.worker_of(self._engine())._adapter_manager
        return manager.get_adapter(registry.LIVE_ID) is current.lora

    def invalidate(self) -> None:
        """Forget the slot: a level-2 sleep discards the buffers, the zeroes in them too, up to vLLM 0.32."""
        self._current = None
        if self._fallback is not None:
            self._fallback.invalidate()

    def _reusable(self, worker: LoraManager, weights: LoraWeights) -> _Registered | None:
        """What the last publish left, in a slot and ready to be overwritten; None when it has to be registered."""
        current = self._current
        if current is None:
            return None
        manager = worker._adapter_manager
        if manager.get_adapter(registry.LIVE_ID) is not current.lora or not current.staging.accepts(weights):
            return None
        if not current.slots.is_current():
            return None
        if manager.lora_index_to_id[current.slot] != registry.LIVE_ID:
            # A user's adapter took the slot. Putting this one back resets all that the slot held.
            if registry.LIVE_ID not in manager.lora_index_to_id:
                registry.activate(worker, registry.LIVE_ID)
            current.slot = manager.lora_index_to_id.index(registry.LIVE_ID)
            current.targets = _targets(current.staging, current.slots, current.slot)
        return current

    def _register(self, worker: LoraManager, weights: LoraWeights) -> _Registered:
        """Register staging tensors under the one id, and prove where vLLM copies them to.

        Raises:
            Unexpected: the buffers are not laid out as in the releases known.
            AdapterNotExpressible: before anything was changed.
        """
        import torch

        manager = worker._adapter_manager
        config = worker.lora_config
        if getattr(config, "fully_sharded_loras", False):
            raise Unexpected("fully sharded LoRA")
        staging = Staging(
            weights, width=int(config.max_lora_rank), dtype=config.lora_dtype, device=_device_of(manager)
        )
        staging.fill_with_pattern()
        lora = registry.lora_model(worker, staging.named(weights), weights, registry.LIVE_ID)
        self._current = None
        registry.register(worker, lora)
        slots = find_slots(manager, lora, {tensor.data_ptr() for tensor in (*staging.a, *staging.b)})
        slot = manager.lora_index_to_id.index(registry.LIVE_ID)
        targets = _targets(staging, slots, slot)
        if not all(torch.equal(target.staging, target.slot) for target in targets):
            raise Unexpected("vLLM changes the adapter's tensors while it copies them")
        copy: FusedCopy | ForeachCopy
        try:
            copy = FusedCopy(weights, targets)
        except NotFused:
            copy = ForeachCopy(staging)
        return _Registered(lora, staging, slots, slot, targets, copy)

    def _fall_back(self, worker: LoraManager, reason: str) -> Registration:
        worker._adapter_manager.remove_adapter(registry.LIVE_ID)
        self._fallback = Registration(self._engine(), reason)
        log_once(
            self._engine(),
            f"adapters are registered anew at every hand-over instead of updated in place: {reason}",
            level=logging.INFO,
        )
        return self._fallback


def _device_of(manager: AdapterManager) -> torch.device:
    for module in manager.modules.values():
        stacked = getattr(module, "lora_a_stacked", None)
        if isinstance(stacked, tuple) and stacked:
            return stacked[0].device
    raise Unexpected("no linear LoRA layer")


def _targets(staging: Staging, slots: Slots, slot: int) -> list[Target]:
    """The buffers' parts in the order of the training model, which need not be that of the engine's modules."""
    tensors = [tensor for _, tensor in (*slots.a, *slots.b)]
    places = {tensor.data_ptr(): view for tensor, view in zip(tensors, slots.views(slot), strict=True)}
    return [Target(tensor, places[tensor.data_ptr()]) for tensor in (*staging.a, *staging.b)]


def _start(current: _Registered, weights: LoraWeights) -> Pending:
    try:
        return current.copy.start(weights, current.targets, current.slot)
    except NotFused:  # trained elsewhere now, or not contiguous any more
        current.copy, current.handed_over = ForeachCopy(current.staging), None
        return current.copy.start(weights, current.targets, current.slot)


@dataclass
class Underway:
    """A copy of what was handed over last, into the slot that it had; see CopyUnderway."""

    sync: BufferCopy
    current: _Registered
    weights: LoraWeights
    slot: int
    pending: Pending
    finished: bool = False

    def base_glance(self, spots: object) -> object | None:
        """See CopyUnderway."""
        return self.pending.base_glance(spots)

    def finish(self, weights: LoraWeights) -> LoraRequest | None:
        """See CopyUnderway."""
        return self.sync.finish(self, weights)
