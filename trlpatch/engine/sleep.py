"""Sleep and wake one engine: which pools are mapped, and whether the weights in them mean anything.

Level 1 copies the weights to the CPU and back. Level 2 discards them, and with them (up to vLLM 0.32) every
LoRA buffer, while the adapter registry still calls them active. KV-only sleep keeps them mapped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trlpatch.engine import guards
from trlpatch.engine.memory import device
from trlpatch.engine.memory.device import GIB
from trlpatch.engine.memory.sleep_mode import sleep_default
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.state import EngineState
from trlpatch.log import log_once, logger, warn_once

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["awake", "put_to_sleep", "sleep_default", "wake"]

_LEVELS = {1: "level 1 (weights to the CPU and back)", 2: "level 2 (weights discarded, pushed anew)"}


def wake(engine: RolloutEngine, state: EngineState, tag: str) -> bool:
    """Map one pool ("weights" or "kv_cache") if it is unmapped; True when that had to be done.

    Raises:
        NotEnoughMemory: the device has no room for it; the engine is as asleep as before then.
    """
    backend = state.backend
    if tag not in backend.asleep():
        backend.mark_awake(tag)
        return False
    guards.install(engine, state)
    concluded = state.headroom.end()
    if concluded:
        log_once(engine, concluded)
    backend.wake(tag)
    backend.mark_awake(tag)
    return True


def put_to_sleep(
    engine: RolloutEngine, state: EngineState, level: int, *, model: Module | None = None, kv_only: bool = False
) -> bool:
    """Unmap the KV cache, and the weights too unless they are shared or need not make way.

    False when the engine was asleep already, or cannot sleep.

    `level` is 1 or 2, for the weights. `model` is the policy in training: measured steps of it decide whether its
    engine's weights make way, unless `kv_only` (sleep="kv") says that they never do.

    Raises:
        EngineBusy: requests are unfinished, or another thread generates.
    """
    with state.occupancy.handing_over(engine.llm_engine, "putting the engine to sleep"):
        return _put_to_sleep(engine, state, level, model, kv_only)


@contextmanager
def awake(engine: RolloutEngine, state: EngineState, model: Module | None = None) -> Iterator[None]:
    """For the time of a `with`: both pools are mapped. What slept before sleeps again after it.

    A reward function or a callback that generates would otherwise leave the backward pass without that memory.

    Raises:
        NotEnoughMemory: the device has no room for it.
    """
    slept, method = state.backend.asleep(), state.sleep_method
    wake(engine, state, WEIGHTS)
    wake(engine, state, KV_CACHE)
    try:
        yield
    finally:
        if KV_CACHE in slept:
            kv_only = WEIGHTS not in slept and not state.headroom.suffices
            _put_to_sleep(engine, state, 1, model, kv_only)
            state.sleep_method = method


def _put_to_sleep(engine: RolloutEngine, state: EngineState, level: int, model: Module | None, kv_only: bool) -> bool:
    backend = state.backend
    sleeping = backend.asleep()
    if WEIGHTS in sleeping:
        return False
    why = _why_kv_only(engine, state, asked=kv_only)
    if why is None and state.shared_weights:
        reason = backend.kv_sleep_unsupported_reason()
        state.sleep_method = f"none: {reason}"
        warn_once(engine, f"the engine stays awake: its weights are the trainer's own, and {reason}")
        return False
    guards.install(engine, state)
    backend.require_idle()
    if why is not None:
        if KV_CACHE in sleeping:
            return False
        backend.drain()
        freed = backend.discard_kv_cache()
        state.sleep_method = f"KV cache only ({why})"
    else:
        wake(engine, state, KV_CACHE)  # half asleep: vLLM counts it as sleeping and would ignore the call
        before = device.free_bytes()
        engine.sleep(level=level)  # guarded: drained first
        guards.slept(state, level)
        freed = (device.free_bytes() or 0) - (before or 0)
        state.sleep_method = _LEVELS.get(level, f"level {level}")
    first = log_once(engine, f"the engine sleeps while training: {state.sleep_method}")
    logger.log(logging.INFO if first else logging.DEBUG, "sleep freed %.2f GiB", freed / GIB)
    if not state.shared_weights and not kv_only:
        weights = backend.weights_bytes()
        state.headroom.begin(weights=weights, weights_unmapped=why is None, model=model)
    return True


def _why_kv_only(engine: RolloutEngine, state: EngineState, *, asked: bool) -> str | None:
    """Why the KV cache alone is unmapped; None when the weights are, too, or nothing can be."""
    if state.shared_weights:
        why = "the weights are the trainer's own"
    elif asked:
        why = 'sleep="kv"'
    elif state.headroom.suffices:
        why = "training leaves room for the weights"
    else:
        return None
    reason = state.backend.kv_sleep_unsupported_reason()
    if reason is None:
        return why
    if not state.shared_weights:
        log_once(engine, f"the KV cache cannot sleep alone: {reason}", level=logging.WARNING)
    return None
