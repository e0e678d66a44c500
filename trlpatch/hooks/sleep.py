"""Where TRL puts its engine to sleep, wakes it and reloads its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.memory import sleep as pools
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS, WEIGHTS
from trlpatch.engine.state import EngineState, state_of
from trlpatch.hooks.adapter_sync import resync
from trlpatch.hooks.settings import options
from trlpatch.hooks.trainers import model_of, serves_remotely
from trlpatch.log import log_once


def sleep(owner: Any, engine: Any, level: int | None = None) -> None:
    """Put the engine to sleep after a rollout (and, from TRL 0.25, right after construction).

    `level` is TRL's; None where TRL itself has no sleep for this trainer. Level 1 is used whenever level 2
    would destroy something that nothing restores: the weights of an attached engine, or LoRA buffers. Weights that
    are the trainer's own, or need not make way, stay and the KV cache goes alone. An engine built without sleep
    stays awake. Raises EngineBusy when requests are unfinished.
    """
    if engine is None or serves_remotely(owner):
        return
    state = state_of(engine)
    if options().sleep == "off":
        return
    if not probes.sleep_enabled(engine):
        log_once(engine, "the engine stays awake while training: it was built without enable_sleep_mode=True")
        return
    pools.put_to_sleep(engine, state, _level(engine, state, level), model=model_of(owner))


def _level(engine: Any, state: EngineState, asked: int | None) -> int:
    if asked is None or state.attached or probes.lora_enabled(engine) or state.holds == "adapter":
        return 1
    return asked


def wake_up(owner: Any, engine: Any, tags: Sequence[str] | None = None) -> None:
    """Wake what TRL asks for, weights first; waking the KV cache means that a rollout follows, so the weights
    must be the policy's by then: if a level-2 sleep discarded them, the owner's own sync runs in between.
    """
    if engine is None or serves_remotely(owner):
        return
    state = state_of(engine)
    wanted = SLEEP_TAGS if tags is None else frozenset(tags)
    if WEIGHTS in wanted or KV_CACHE in wanted:
        pools.wake(engine, state, WEIGHTS)
    if KV_CACHE in wanted:
        if state.weights_lost and tags is not None:
            resync(owner, engine, state, "a level-2 sleep discarded the engine's weights")
        pools.wake(engine, state, KV_CACHE)


def reload_weights(owner: Any, engine: Any, **_: Any) -> None:
    """Never reloads: TRL 0.26.0-1.9.2 would load the checkpoint from disk over the policy that it has just
    pushed.

    https://github.com/huggingface/trl/issues/5312; discarded weights are pushed from the trainer instead.
    """
    if engine is not None:
        log_once(
            engine,
            "reload_weights is not run: it would replace the policy by the checkpoint on disk (trl #5312)",
        )


def awake_with_live_weights(owner: Any, engine: Any, state: EngineState) -> None:
    """What has to be true when a rollout starts, whatever TRL did or did not do before it."""
    pools.wake(engine, state, WEIGHTS)
    if state.weights_lost:
        resync(owner, engine, state, "a level-2 sleep discarded the engine's weights")
    pools.wake(engine, state, KV_CACHE)
