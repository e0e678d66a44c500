"""KV-only sleep for engines whose workers live in other processes (tensor parallelism, V1 multiprocessing).

Build the engine with `worker_extension_cls="trlpatch.engine.worker_extension.KvCacheSleep"`: vLLM mixes the class into
its worker, and `collective_rpc` reaches it by method name. A function would have to be pickled to the engine's
process, which vLLM allows only with VLLM_ALLOW_INSECURE_SERIALIZATION=1.
"""

from __future__ import annotations

from typing import Any

from trlpatch.engine.memory import cumem
from trlpatch.engine.probes import KV_CACHE

DISCARD, WAKE = "trlpatch_discard_kv_cache", "trlpatch_wake_kv_cache"


class KvCacheSleep:
    """Methods of the worker; every name is ours, because vLLM refuses a name that its worker has too."""

    def trlpatch_discard_kv_cache(self) -> int:
        """Unmap the KV cache's pool of this worker; the bytes given back."""
        return cumem.discard_kv_cache(self)

    def trlpatch_wake_kv_cache(self) -> None:
        """Map it again, through the worker's own wake_up, which also repairs what else was in the pool."""
        worker: Any = self
        with cumem.whole_wake({KV_CACHE}):
            worker.wake_up(tags=[KV_CACHE])
