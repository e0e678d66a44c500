"""Sleep that gives back the KV cache and leaves the weights where they are.

Nothing is copied, adapters and CUDA graphs stay valid, and storage that a trainer shares stays mapped. vLLM's own
`wake_up(tags=["kv_cache"])` ends it: the executor is told that this pool sleeps, and the worker's wake also repairs
what else was in the pool (up to 0.28 all of `initialize_kv_cache`: block tables of Model Runner V2, fp8 scales).
"""

from __future__ import annotations

from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.drain import unfinished
from trlpatch.engine.memory import cumem
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.state import EngineState
from trlpatch.engine.worker_extension import DISCARD, WAKE, KvCacheSleep
from trlpatch.errors import EngineBusy

EXTENSION = f"{KvCacheSleep.__module__}.{KvCacheSleep.__qualname__}"


def asleep(engine: Any, state: EngineState) -> set[str]:
    """The pools that are unmapped now; the executor's own word where it can be asked."""
    told = probes.sleeping_tags(engine)
    return set(state.asleep if told is None else told)


def why_not(engine: Any) -> str | None:
    """Why this engine cannot give back its KV cache alone; None when it can."""
    if not probes.sleep_enabled(engine):
        return "it was built without enable_sleep_mode=True"
    if probes.executor(engine) is not None:
        if probes.sleeping_tags(engine) is None:
            return "its executor does not say which pools sleep (vLLM below 0.8.3)"
        return None
    if _native(engine) or _extended(engine):
        return None
    return (
        "its workers live in other processes: set VLLM_ENABLE_V1_MULTIPROCESSING=0, or build it with "
        f"worker_extension_cls={EXTENSION!r}"
    )


def discard(engine: Any, state: EngineState) -> int:
    """Unmap the KV cache of an engine that is awake; return the bytes given back on all its devices.

    The prefix, multi-modal and encoder caches are reset first: they would name memory whose contents are gone.
    Raises EngineBusy when requests are unfinished, and marks nothing asleep then.
    """
    _require_idle(engine)
    _reset_caches(engine)
    executor = probes.executor(engine)
    if executor is None:
        freed = 0
        if _native(engine):
            engine.sleep(level=0)
            engine.release_kv_cache_memory()
        else:
            freed = sum(engine.collective_rpc(DISCARD))
            state.kv_asleep_in_workers = True
    elif callable(getattr(executor, "discard", None)):  # vLLM 0.31+ keeps the books itself
        freed = cumem.pool_bytes(KV_CACHE)
        executor.discard((KV_CACHE,))
    else:
        freed = sum(engine.collective_rpc(cumem.discard_kv_cache))
        executor.sleeping_tags = {KV_CACHE}
        executor.is_sleeping = True
    state.asleep = {KV_CACHE}
    return freed


def wake_in_workers(llm_engine: Any, state: EngineState) -> None:
    """End a sleep that only the workers know about; the engine core believes that it is awake."""
    llm_engine.collective_rpc(WAKE)
    state.kv_asleep_in_workers = False
    state.asleep.discard(KV_CACHE)


def weights_bytes(engine: Any) -> int | None:
    """The size of the engine's weights pool (with its LoRA buffers); None when it is not in this process."""
    return None if probes.executor(engine) is None else cumem.pool_bytes(WEIGHTS) or None


def _native(engine: Any) -> bool:
    return callable(getattr(engine, "release_kv_cache_memory", None))  # vLLM 0.31+, vllm-project/vllm#44890


def _extended(engine: Any) -> bool:
    config = getattr(getattr(engine.llm_engine, "vllm_config", None), "parallel_config", None)
    return str(getattr(config, "worker_extension_cls", "")) == EXTENSION


def _require_idle(engine: Any) -> None:
    if unfinished(engine):
        raise EngineBusy(
            "putting the engine to sleep: it has unfinished requests, whose KV cache would be unmapped under them; "
            "let generate() return, or abort them with llm.llm_engine.abort_request(...)"
        )


def _reset_caches(engine: Any) -> None:
    # False says that blocks are in use; None that this release does not say.
    if engine.reset_prefix_cache() is False:
        raise EngineBusy(
            "putting the engine to sleep: vLLM could not reset its prefix cache, because blocks of it are in use; "
            "later rollouts would read memory whose contents are gone. Finish or abort the requests first"
        )
    for name in ("reset_mm_cache", "reset_encoder_cache"):
        reset = getattr(engine.llm_engine, name, None)
        if callable(reset):
            reset()
