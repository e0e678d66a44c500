"""Rollout backends of engines whose workers run in other processes (tensor parallelism, V1 multiprocessing)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync.adapter_files import AdapterFiles
from trlpatch.engine.adapter_sync.protocol import AdapterSync
from trlpatch.engine.inprocess import InProcessBackend
from trlpatch.engine.llm_backend import LLMBackend, no_worker_model
from trlpatch.engine.memory import device
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS
from trlpatch.engine.protocols import LLMEngine, RolloutEngine
from trlpatch.engine.worker_extension import DISCARD, EXTENSION, WAKE
from trlpatch.log import log_once
from trlpatch.policy.adapter import LoraView

if TYPE_CHECKING:
    from torch.nn import Module


class _WorkersElsewhere(LLMBackend):
    """What cannot be done on a worker's own objects, because the worker is in another process."""

    def new_adapter_sync(self) -> AdapterSync:
        """Through files."""
        log_once(
            self.engine,
            "the engine's worker runs in another process: adapters are handed over through files in a private "
            "directory",
            level=logging.INFO,
        )
        return AdapterFiles(self.engine)

    def adapter_misfit(self, directory: Path) -> str | None:
        """Nothing to compare with."""
        return None

    def base_mismatch(self, view: LoraView) -> str | None:
        """Nothing to compare with."""
        return None

    def lora_layers(self) -> str | None:
        """vLLM's, always: ours are for a worker in this process."""
        return None

    def worker_model(self) -> Module:
        """It is elsewhere."""
        raise no_worker_model()


class ExecutorBackend(_WorkersElsewhere, InProcessBackend):
    """The executor is in this process and says what sleeps; its workers are not (tensor parallelism)."""

    location = "workers in other processes"


class WorkersBackend(_WorkersElsewhere):
    """The engine core runs in another process, executor and workers with it: all goes through vLLM's own calls."""

    location = "engine core in another process"

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(engine)
        self._inner = engine.llm_engine
        self._kv_asleep_in_workers = False
        """The workers unmapped their KV cache, and the executor in the engine's own process does not know."""

    def before_weight_push(self) -> None:
        """Wait for this process's own kernels; the engine core orders the push behind what it runs."""
        self.drain()

    def drain(self) -> None:
        """Wait for this process's kernels: batches in flight are the engine core's own business, it finishes them."""
        device.synchronize()

    def _kv_sleep_reason(self) -> str | None:
        if self._native or self._extended:
            return None
        return (
            "its workers live in other processes: set VLLM_ENABLE_V1_MULTIPROCESSING=0, or build it with "
            f"worker_extension_cls={EXTENSION!r}"
        )

    @property
    def _native(self) -> bool:
        return callable(getattr(self.engine, "release_kv_cache_memory", None))  # vLLM 0.31+, vllm-project/vllm#44890

    @property
    def _extended(self) -> bool:
        config = probes.reach(self._inner, "vllm_config", "parallel_config")
        return str(getattr(config, "worker_extension_cls", "")) == EXTENSION

    def _discard_kv_cache(self) -> int:
        engine: Any = self.engine
        if self._native:
            engine.sleep(level=0)
            engine.release_kv_cache_memory()
            return 0
        freed: int = sum(engine.collective_rpc(DISCARD))
        self._kv_asleep_in_workers = True
        return freed

    def wake(self, tag: str) -> None:
        """Map one pool, after torch's cache is emptied: the workers cannot reach it, on the same device."""
        device.free_up(sys.maxsize)
        self.drain()
        self.engine.wake_up(tags=[tag])

    def weights_bytes(self) -> int | None:
        """The pools are elsewhere."""
        return None

    @property
    def wakes(self) -> LLMEngine:
        """The engine: the executor cannot be reached."""
        return self._inner

    def guarded_wake(self, original: Callable[..., Any], tags: Collection[str] | None = None) -> Any:
        """End a sleep that only the workers know about: the engine core believes that it is awake."""
        wanted = None if tags is None else list(tags)
        if self._kv_asleep_in_workers:
            if wanted is None or KV_CACHE in wanted:
                self._inner.collective_rpc(WAKE)
                self._kv_asleep_in_workers = False
                self._asleep.discard(KV_CACHE)
            return None
        result = original(wanted)
        self._asleep -= set(wanted or SLEEP_TAGS)
        return result
