"""Sleep, wake and reload hooks: where TRL puts its engine to sleep, wakes it and reloads its weights."""

from __future__ import annotations

from collections.abc import Sequence

from trlpatch.engine import probes
from trlpatch.engine import sleep as pools
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS, WEIGHTS
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.state import EngineState, state_of
from trlpatch.hooks.adapter_sync import resync
from trlpatch.hooks.protocols import Owner
from trlpatch.hooks.trainers import model_of, serves_remotely
from trlpatch.log import log_once
from trlpatch.options import active


def sleep(owner: Owner, engine: RolloutEngine | None, level: int | None = None) -> None:
    """Put the engine to sleep after a rollout (and, from TRL 0.25, right after construction).

    `level` is TRL's; None where TRL itself has no sleep for this trainer. Level 1 is used whenever level 2
    would destroy something that nothing restores: the weights of an attached engine, or LoRA buffers. Weights that
    are the trainer's own, or need not make way, stay and the KV cache goes alone. An engine built without sleep
    stays awake.

    Raises:
        EngineBusy: requests are unfinished.
    """
    if engine is None or serves_remotely(owner):
        return
    state, options = state_of(engine), active()
    if options.sleep == "off":
        return
    if not probes.sleep_enabled(engine):
        log_once(engine, "the engine stays awake while training: it was built without enable_sleep_mode=True")
        return
    pools.put_to_sleep(
        engine, state, _level(engine, state, level), model=model_of(owner), kv_only=options.sleep == "kv"
    )


def _level(engine: RolloutEngine, state: EngineState, asked: int | None) -> int:
    if asked is None or state.attached or probes.lora_enabled(engine) or state.policy_location == "adapter":
        return 1
    return asked


def wake_up(owner: Owner, engine: RolloutEngine | None, tags: Sequence[str] | None = None) -> None:
    """Wake what TRL asks for, weights first.

    Waking the KV cache means that a rollout follows, so the weights must be the policy's by then: if a level-2 sleep
    discarded them, the owner's own sync runs in between.

    Raises:
        NotEnoughMemory: the device has no room for what is to be woken.
        StaleAdapter: the weights were discarded and nothing pushes them.
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


def reload_weights(owner: Owner, engine: RolloutEngine | None, **_: object) -> None:
    """Reload nothing: TRL 0.26.0-1.9.2 would load the checkpoint over the policy that it has just pushed.

    https://github.com/huggingface/trl/issues/5312; discarded weights are pushed from the trainer instead.
    """
    if engine is not None:
        log_once(
            engine,
            "reload_weights is not run: it would replace the policy by the checkpoint on disk (trl #5312)",
        )


def awake_with_live_weights(
    owner: Owner, engine: RolloutEngine, state: EngineState, *, every_rank: bool = True
) -> None:
    """What has to be true when a rollout starts, whatever TRL did or did not do before it."""
    pools.wake(engine, state, WEIGHTS)
    if state.weights_lost:
        resync(owner, engine, state, "a level-2 sleep discarded the engine's weights", every_rank=every_rank)
    pools.wake(engine, state, KV_CACHE)
