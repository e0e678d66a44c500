"""Sleep and wake of one engine: which pools are mapped, and whether the weights in them mean anything.

Level 1 copies the weights to the CPU and back. Level 2 discards them, and with them (up to vLLM 0.32) every
LoRA buffer, while the adapter registry still calls them active. KV-only sleep keeps them mapped.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from trlpatch.engine import guards, probes
from trlpatch.engine.drain import drain
from trlpatch.engine.memory import cumem, device, kv_sleep
from trlpatch.engine.memory.device import GIB
from trlpatch.engine.memory.kv_sleep import asleep
from trlpatch.engine.memory.sleep_mode import sleep_default, why_no_sleep_mode
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.state import EngineState
from trlpatch.log import log_once, logger, warn_once
from trlpatch.options import active

__all__ = ["asleep", "put_to_sleep", "sleep_default", "wake", "why_no_sleep_mode"]

_LEVELS = {1: "level 1 (weights to the CPU and back)", 2: "level 2 (weights discarded, pushed anew)"}


def wake(engine: Any, state: EngineState, tag: str) -> bool:
    """Map one pool ("weights" or "kv_cache") if it is unmapped; True when that had to be done.

    Raises NotEnoughMemory when the device has no room for it; the engine is as asleep as before then.
    """
    if tag not in asleep(engine, state):
        state.asleep.discard(tag)
        return False
    guards.install(engine, state)
    concluded = state.headroom.end()
    if concluded:
        log_once(engine, concluded)
    if probes.executor(engine) is None or cumem.allocator() is None:
        # The workers cannot reach what torch caches here, on the same device.
        device.free_up(sys.maxsize)
    drain(engine)
    engine.wake_up(tags=[tag])
    state.asleep.discard(tag)
    return True


def put_to_sleep(engine: Any, state: EngineState, level: int, *, model: Any = None) -> bool:
    """Unmap the KV cache, and the weights too unless they are shared or need not make way. False when the engine was
    asleep already, or cannot sleep.

    `level` is 1 or 2, for the weights. `model` is the policy in training: measured steps of it decide whether its
    engine's weights make way (sleep="auto"). Raises EngineBusy when requests are unfinished.
    """
    sleeping = asleep(engine, state)
    if WEIGHTS in sleeping:
        return False
    why = _kv_only(engine, state)
    if why is None and state.shared_weights:
        reason = kv_sleep.why_not(engine)
        state.sleep_method = f"none: {reason}"
        warn_once(engine, f"the engine stays awake: its weights are the trainer's own, and {reason}")
        return False
    guards.install(engine, state)
    drain(engine)
    if why is not None:
        if KV_CACHE in sleeping:
            return False
        freed = kv_sleep.discard(engine, state)
        state.sleep_method = f"KV cache only ({why})"
    else:
        wake(engine, state, KV_CACHE)  # half asleep: vLLM counts it as sleeping and would ignore the call
        before = device.free_bytes()
        engine.sleep(level=level)
        guards.slept(state, level)
        freed = (device.free_bytes() or 0) - (before or 0)
        state.sleep_method = _LEVELS.get(level, f"level {level}")
    first = log_once(engine, f"the engine sleeps while training: {state.sleep_method}")
    logger.log(logging.INFO if first else logging.DEBUG, "sleep freed %.2f GiB", freed / GIB)
    if not state.shared_weights and active().sleep != "kv":
        weights = kv_sleep.weights_bytes(engine)
        state.headroom.begin(weights=weights, weights_unmapped=why is None, model=model)
    return True


def _kv_only(engine: Any, state: EngineState) -> str | None:
    """Why the KV cache alone is unmapped; None when the weights are, too, or nothing can be."""
    if state.shared_weights:
        why = "the weights are the trainer's own"
    elif active().sleep == "kv":
        why = 'sleep="kv"'
    elif state.headroom.suffices:
        why = "training leaves room for the weights"
    else:
        return None
    reason = kv_sleep.why_not(engine)
    if reason is None:
        return why
    if not state.shared_weights:
        log_once(engine, f"the KV cache cannot sleep alone: {reason}", level=logging.WARNING)
    return None
