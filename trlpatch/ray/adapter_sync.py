"""Adapter sync to Ray actors: the adapter alone travels, once for all engines of a node."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.protocols import LoraRequest
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.change_detection import Sums, content
from trlpatch.ray.packed import pack

if TYPE_CHECKING:
    from trlpatch.ray.protocols import Engines


class RayAdapterSync:
    """Sends the adapter when its contents have changed; see AdapterSync.

    Every engine takes it between two steps, by the adapter sync that it would have in the trainer's process, and the
    version it holds then is in every response.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = weakref.ref(engines)
        self._request: LoraRequest | None = None
        self._sent: tuple[weakref.ref[LoraWeights], list[Sums], list[float]] | None = None

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""
        engines = self._engines()
        if engines is None or not engines.adapter_version:
            return "sent to Ray actors"
        size = f"{engines.adapter_bytes / 2**20:.1f} MiB"
        return f"sent to Ray actors (version {engines.adapter_version}, {size}, {engines.sync_seconds * 1e3:.0f} ms)"

    @property
    def compares(self) -> bool:
        """Nothing is sent twice."""
        return True

    def start(self) -> None:
        """Nothing is sent that has not changed."""

    def publish(self, weights: LoraWeights) -> LoraRequest:
        """Send the adapter to every engine, unless they hold it.

        Raises:
            EngineLost: one of them did not take it, and cannot be replaced.
            RolloutTimeout: one of them did not take it in time.
        """
        import torch

        engines = self._engines()
        if engines is None:
            registry.worker_of(None)  # raises StaleAdapter
            raise AssertionError
        marks, scalings = content(weights), list(weights.scalings)
        request, sent = self._request, self._sent
        if request is not None and sent is not None and engines.holds_live(request):
            of, marks_then, scalings_then = sent
            if of() is weights and scalings_then == scalings and marks_then == marks:
                return request
        self._request = self._sent = None
        started = time.monotonic()
        dtype = getattr(probes.lora_config(engines), "lora_dtype", None)
        packed = pack(weights, dtype if isinstance(dtype, torch.dtype) else torch.float32)
        request = registry.fresh_request(registry.NOWHERE, lora_id=registry.LIVE_ID)
        engines.publish_adapter(packed, request)
        engines.sync_seconds = time.monotonic() - started  # with the time of packing
        self._request, self._sent = request, (weakref.ref(weights), marks, scalings)
        return request

    def holds(self, request: LoraRequest) -> bool:
        """Do all engines hold it?"""
        engines = self._engines()
        return request is self._request and engines is not None and engines.holds_live(request)

    def invalidate(self) -> None:
        """Send everything anew at the next publish."""
        self._request = self._sent = None
