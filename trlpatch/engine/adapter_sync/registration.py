"""Adapter sync by registering anew: right for every layer that vLLM has, at the cost of copies and `set_lora`."""

from __future__ import annotations

import weakref

from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.adapter_tensors import adapter_tensors


class Registration:
    """Registers every version with the worker's LoRA manager, which lives in this process, under a new id."""

    def __init__(self, engine: RolloutEngine | None, reason: str | None = None) -> None:
        self._engine = weakref.ref(engine)
        self._reason = reason
        self._current: int | None = None
        self._valid = False

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""
        return "registered anew each time" + (f" ({self._reason})" if self._reason else "")

    @property
    def compares(self) -> bool:
        """Every version is handed over at a price."""
        return False

    def publish(self, weights: LoraWeights) -> LoraRequest:
        """Register copies with the worker; see AdapterSync."""
        worker = registry.worker_of(self._engine())
        request = registry.fresh_request(registry.NOWHERE)
        lora = registry.lora_model(worker, adapter_tensors(weights).tensors, weights, request.lora_int_id)
        if self._current is not None:
            worker._adapter_manager.remove_adapter(self._current)
            self._current = None
        registry.register(worker, lora)
        self._current, self._valid = request.lora_int_id, True
        return request

    def start(self) -> None:
        """Nothing is handed over that has not changed."""

    def holds(self, request: LoraRequest) -> bool:
        """Ask the worker's registry."""
        return self._valid and request.lora_int_id in registry.worker_of(self._engine()).list_adapters()

    def invalidate(self) -> None:
        """Stand by no version, whatever the registry says."""
        self._valid = False
