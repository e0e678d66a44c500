"""Writing the adapter into the buffers that the engine's kernels and CUDA graphs read."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.adapter_sync.registration import Registration
from trlpatch.engine.adapter_sync.slots import Slots, Unexpected, find_slots
from trlpatch.engine.adapter_sync.staging import Staging
from trlpatch.engine.state import state_of
from trlpatch.log import log_once
from trlpatch.policy.adapter import LoraWeights


@dataclass
class _Registered:
    """The adapter as vLLM's registry has it, and the way into its slot."""

    lora: Any
    staging: Staging
    sources: list[Any]
    """Every staging A, then every B."""
    slots: Slots
    slot: int
    targets: list[Any]
    """The parts of the buffers that `sources` are copied into."""


class BufferCopy:
    """Registers the adapter once, under one id, and overwrites the engine's LoRA buffers on every later publish.

    vLLM allocates these buffers once and swaps adapters by copying into them, also under captured CUDA graphs; this is
    the same copy, for all layers at once. When modules or ranks change, or vLLM has dropped the adapter, it is
    registered again, which zeroes what is no longer adapted. The engine must be idle; device work is queued on the
    current stream, which in-process vLLM computes on.

    Where the buffers are not as expected every version is registered anew (`Registration`); `description` says why.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._current: _Registered | None = None
        self._request: Any = None
        self._fallback: Registration | None = None

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""
        return "in place" if self._fallback is None else self._fallback.description

    def publish(self, weights: LoraWeights) -> Any:
        """Write the adapter into the engine's buffers; see AdapterSync."""
        import torch

        if self._fallback is not None:
            return self._fallback.publish(weights)
        worker = registry.worker_of(self._engine())
        current = self._standing(worker, weights)
        # Buffers may be inference tensors. Trained ones are only read.
        with torch.inference_mode():
            if current is None:
                try:
                    current = self._register(worker, weights)
                except Unexpected as reason:
                    return self._fall_back(worker, str(reason)).publish(weights)
            self._current = None  # should a copy fail, the next publish starts over
            current.staging.write(weights)
            torch._foreach_copy_(current.targets, current.sources)
        self._current = current
        self._request = registry.fresh_request(registry.NOWHERE, lora_id=registry.LIVE_ID)
        return self._request

    def holds(self, request: Any) -> bool:
        """Tell whether the request is the newest one, and its adapter still registered."""
        if self._fallback is not None:
            return self._fallback.holds(request)
        current = self._current
        if current is None or request is not self._request:
            return False
        manager = registry.worker_of(self._engine())._adapter_manager
        return manager.get_adapter(registry.LIVE_ID) is current.lora

    def _standing(self, worker: Any, weights: LoraWeights) -> _Registered | None:
        """What the last publish left, in a slot and ready to be overwritten; None when it has to be registered."""
        current = self._current
        published = state_of(self._engine()).published
        # Nothing published although something was: a level-2 sleep discarded the buffers, zeroes and all.
        if current is None or published is None or published.request is not self._request:
            return None
        manager = worker._adapter_manager
        if manager.get_adapter(registry.LIVE_ID) is not current.lora or not current.staging.accepts(weights):
            return None
        if not current.slots.stand():
            return None
        if manager.lora_index_to_id[current.slot] != registry.LIVE_ID:
            # A user's adapter took the slot. Putting this one back resets all that the slot held.
            if registry.LIVE_ID not in manager.lora_index_to_id:
                registry.activate(worker, registry.LIVE_ID)
            current.slot = manager.lora_index_to_id.index(registry.LIVE_ID)
            current.targets = current.slots.views(current.slot)
        return current

    def _register(self, worker: Any, weights: LoraWeights) -> _Registered:
        """Register staging tensors under the one id, and prove where vLLM copies them to.

        Raises Unexpected, and AdapterNotExpressible before anything was changed.
        """
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
        sources = [*staging.a, *staging.b]
        slots = find_slots(manager, lora, {tensor.data_ptr() for tensor in sources})
        slot = manager.lora_index_to_id.index(registry.LIVE_ID)
        targets = slots.views(slot)
        # In the order of the buffers, which need not be that of the training model.
        sources = [tensor for _, tensor in (*slots.a, *slots.b)]
        if not _equal(sources, targets):
            raise Unexpected("vLLM changes the adapter's tensors while it copies them")
        return _Registered(lora, staging, sources, slots, slot, targets)

    def _fall_back(self, worker: Any, reason: str) -> Registration:
        worker._adapter_manager.remove_adapter(registry.LIVE_ID)
        engine = self._engine()
        self._fallback = Registration(engine, reason)
        log_once(
            engine,
            f"adapters are registered anew at every hand-over instead of updated in place: {reason}",
            level=logging.INFO,
        )
        return self._fallback


def _device_of(manager: Any) -> Any:
    for module in manager.modules.values():
        stacked = getattr(module, "lora_a_stacked", None)
        if isinstance(stacked, tuple) and stacked:
            return stacked[0].device
    raise Unexpected("no linear LoRA layer")


def _equal(one: list[Any], other: list[Any]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
