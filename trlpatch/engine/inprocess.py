"""The rollout backend of an engine whose executor and worker are in this process.

KV-only sleep copies nothing: adapters and CUDA graphs stay valid, and storage that a trainer shares stays mapped.
vLLM's own `wake_up(tags=["kv_cache"])` ends it: the executor is told that this pool sleeps, and the worker's wake also
repairs what else was in the pool (up to 0.28 all of `initialize_kv_cache`: block tables of Model Runner V2, fp8
scales).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.engine import base_weights, probes
from trlpatch.engine.adapter_sync import shape_check
from trlpatch.engine.adapter_sync.adapter_files import AdapterFiles
from trlpatch.engine.adapter_sync.buffer_copy import BufferCopy
from trlpatch.engine.adapter_sync.protocol import AdapterSync
from trlpatch.engine.drain import drain
from trlpatch.engine.llm_backend import LLMBackend, no_worker_model
from trlpatch.engine.memory import cumem, device
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS, WEIGHTS
from trlpatch.engine.protocols import Executor, LoraManager, RolloutEngine
from trlpatch.log import log_once
from trlpatch.policy.adapter import LoraView

if TYPE_CHECKING:
    from torch.nn import Module


class InProcessBackend(LLMBackend):
    """Asks the executor what sleeps, and works on the worker's own objects; see `RolloutBackend`."""

    def __init__(self, engine: RolloutEngine, executor: Executor) -> None:
        super().__init__(engine)
        self._executor = executor

    @property
    def _lora_manager(self) -> LoraManager | None:
        return probes.worker_lora_manager(self.engine)

    def new_adapter_sync(self) -> AdapterSync:
        """Write into the engine's buffers; through files where this vLLM keeps its LoRA manager elsewhere."""
        engine = self.engine
        if self._lora_manager is not None:
            return BufferCopy(engine)
        log_once(engine, "the worker shows no LoRA manager: adapters are handed over through files")
        return AdapterFiles(engine)

    def adapter_misfit(self, directory: Path) -> str | None:
        """Compare the saved shapes with the LoRA layers'."""
        manager = self._lora_manager
        return None if manager is None else shape_check.directory_misfit(manager._adapter_manager, directory)

    def base_mismatch(self, view: LoraView) -> str | None:
        """Compare the weights themselves."""
        module, manager = probes.engine_module(self.engine), self._lora_manager
        if module is None or manager is None:
            return None
        return base_weights.base_mismatch(view, module, manager._adapter_manager.packed_modules)

    def lora_layers(self) -> str | None:
        """Count the single-adapter ones."""
        manager = self._lora_manager
        if manager is None:
            return None
        kinds = [getattr(layer, "is_single_adapter", False) for layer in manager._adapter_manager.modules.values()]
        return f"single-adapter layers ({sum(kinds)} of {len(kinds)})" if any(kinds) else "vLLM's LoRA layers"

    def before_weight_push(self) -> None:
        """Drain: the push writes into weights that a step in flight reads."""
        self.drain()

    def worker_model(self) -> Module:
        """The module that the worker runs."""
        module = probes.engine_module(self.engine)
        if module is None:
            raise no_worker_model()
        return module

    def drain(self) -> None:
        """Take the answers of batches that are still queued, then wait for the device."""
        engine = self._engine()
        if engine is None:  # its `llm_engine` may outlive it, guards and all
            device.synchronize()
        else:
            drain(engine)

    def asleep(self) -> set[str]:
        """The executor's own word where it can be asked."""
        told = self._told()
        return super().asleep() if told is None else told & SLEEP_TAGS

    def unmapped(self) -> set[str]:
        """As `asleep`, with pools that only newer releases have."""
        told = self._told()
        return super().unmapped() if told is None else told

    def _told(self) -> set[str] | None:
        tags = getattr(self._executor, "sleeping_tags", None)
        return set(tags) if isinstance(tags, (set, frozenset)) else None

    def _kv_sleep_reason(self) -> str | None:
        return None if self._told() is not None else "its executor does not say which pools sleep (vLLM below 0.8.3)"

    def _discard_kv_cache(self) -> int:
        executor = self._executor
        discard = getattr(executor, "discard", None)
        if callable(discard):  # vLLM 0.31+ keeps the books itself
            freed = cumem.pool_bytes(KV_CACHE)
            discard((KV_CACHE,))
            return freed
        freed = sum(self.engine.collective_rpc(cumem.discard_kv_cache))
        executor.sleeping_tags = {KV_CACHE}
        executor.is_sleeping = True
        return freed

    def wake(self, tag: str) -> None:
        """Map one pool, drained first."""
        if cumem.allocator() is None:
            # The workers cannot reach what torch caches here, on the same device.
            device.free_up(sys.maxsize)
        self.drain()
        self.engine.wake_up(tags=[tag])

    def weights_bytes(self) -> int | None:
        """The allocator's word, all that a sleep of the KV cache alone leaves mapped; None when it is not here.

        vLLM 0.33 has the LoRA buffers in a pool beside the weights'.
        """
        return cumem.bytes_beside(KV_CACHE) or None

    @property
    def wakes(self) -> Executor:
        """The executor: `LLM.wake_up` and `LLMEngine.wake_up` both end there."""
        return self._executor

    def guarded_wake(self, original: Callable[..., Any], tags: Collection[str] | None = None) -> Any:
        """Ask vLLM for those of `tags` that sleep, with enough memory and nothing mapped twice."""
        sleeping = self.unmapped()
        if not sleeping:
            return original(tags)
        if tags is None:
            # After a whole sleep None is more than the two tags: newer releases have pools of other names.
            wanted = None if WEIGHTS in sleeping else sorted(sleeping)
        else:
            wanted = [tag for tag in tags if tag in sleeping or tag not in SLEEP_TAGS]
            if not wanted:
                return None
        with cumem.whole_wake(wanted):
            result = original(wanted)
        self._asleep -= set(wanted or SLEEP_TAGS)
        return result
