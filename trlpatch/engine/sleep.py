"""Sleep and wake of one engine: which pools are mapped, and whether the weights in them mean anything.

Level 1 copies the weights to the CPU and back. Level 2 discards them, and with them (up to vLLM 0.32) every
LoRA buffer, while the adapter registry still calls them active.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS, WEIGHTS
from trlpatch.engine.state import EngineState


def asleep(engine: Any, state: EngineState) -> set[str]:
    """The pools that are unmapped now; the executor's own word where it can be asked."""
    told = probes.sleeping_tags(engine)
    return set(state.asleep if told is None else told)


def wake(engine: Any, state: EngineState, tag: str) -> bool:
    """Map one pool ("weights" or "kv_cache") if it is unmapped; True when that had to be done."""
    if tag not in asleep(engine, state):
        state.asleep.discard(tag)
        return False
    _free_cached_memory()
    engine.wake_up(tags=[tag])
    state.asleep.discard(tag)
    return True


def put_to_sleep(engine: Any, state: EngineState, level: int) -> bool:
    """Unmap both pools; level 2 loses the weights. False when the engine was asleep already."""
    if WEIGHTS in asleep(engine, state):
        return False
    wake(engine, state, KV_CACHE)  # half asleep: vLLM counts it as sleeping and would ignore the call
    _finish_device_work()
    engine.sleep(level=level)
    state.asleep = set(SLEEP_TAGS)
    if level >= 2:
        state.weights_lost = True
        state.published = None
        if state.holds == "adapter":
            state.holds = "checkpoint"
    return True


def _finish_device_work() -> None:
    """vLLM below 0.25.1 unmaps without waiting for kernels that still run, and async scheduling may leave
    some.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _free_cached_memory() -> None:
    """Memory that torch caches for the trainer is memory that vLLM cannot map."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
