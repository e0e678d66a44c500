"""LoRA request hook, the `lora_request=` of every rollout: the adapter as it is at this moment."""

from __future__ import annotations

from trlpatch.engine import publisher
from trlpatch.engine import weights_publisher as in_place
from trlpatch.engine.attach import attached_engine, current_request
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.engine.state import state_of
from trlpatch.errors import AdapterNotExpressible, StaleAdapter
from trlpatch.hooks.adapter_sync import AdapterPath, adapter_path, hand_over, resync
from trlpatch.hooks.protocols import Owner
from trlpatch.hooks.sleep import awake_with_live_weights
from trlpatch.hooks.trainers import model_of, serves_remotely


def lora_request(owner: Owner, engine: RolloutEngine | None, given: LoraRequest | None = None) -> LoraRequest | None:
    """The request to generate with, or None when the policy is in the engine's base weights.

    Makes the rollout right whatever came before: wakes the engine, has discarded weights pushed, and hands
    the adapter over when it has moved since the last hand-over (a trainer that syncs every few steps would
    otherwise roll out with an older one). `given` is a request that the call already had; it wins.

    Raises:
        StaleAdapter: rather than return an adapter that is not the current one.
        EngineBusy: another thread generates on the engine.
    """
    return _request(owner, engine, given, every_rank=True)


def one_ranks_request(owner: Owner, engine: RolloutEngine) -> LoraRequest | None:
    """As `lora_request`, for a call that the other ranks may not make: a callback, a reward function, user code.

    Raises:
        StaleAdapter: also where only all ranks together could hand the adapter over, because it is sharded.
        EngineBusy: another thread generates on the engine.
    """
    return _request(owner, engine, None, every_rank=False)


def _request(
    owner: Owner, engine: RolloutEngine | None, given: LoraRequest | None, *, every_rank: bool
) -> LoraRequest | None:
    if engine is None or serves_remotely(owner):
        return given
    with state_of(engine).occupancy.handing_over(
        engine.llm_engine, f"a rollout of {type(owner).__name__}", abort=True
    ):
        return _current(owner, engine, given, every_rank)


def _current(owner: Owner, engine: RolloutEngine, given: LoraRequest | None, every_rank: bool) -> LoraRequest | None:
    state = state_of(engine)
    awake_with_live_weights(owner, engine, state, every_rank=every_rank)
    if given is not None:
        return given
    path = adapter_path(owner, engine, every_rank=every_rank)
    if path.live and _disabled(path):
        return None
    if path.live and path.view is not None:
        try:
            request = publisher.current_request(path.view, path.view.base, engine)
        except AdapterNotExpressible:
            request = None  # another adapter than at the last sync: `hand_over` decides what becomes of it
        if request is None and hand_over(owner, every_rank=every_rank):
            view = path.view.snapshot(every_rank=every_rank)
            request = publisher.current_request(view, path.view.base, engine)
            if request is None:
                raise StaleAdapter(
                    f"a rollout of {type(owner).__name__} would not use the current adapter: it changed, or was "
                    "evicted, while it was handed over; do not train it from another thread while it generates"
                )
        if request is not None:
            return request
        path = adapter_path(owner, engine, every_rank=every_rank)
    if state.policy_location == "weights" or state.torn:
        model = model_of(owner)
        if in_place.holds_policy(model, engine) or in_place.write_policy(model, engine) is None:
            return None
        resync(owner, engine, state, "its weights cannot be written in place any more", every_rank=every_rank)
    elif state.policy_location != "policy" and path.view is not None:
        # The adapter has become one that vLLM cannot serve, or never was: the sync has to bring merged weights.
        reason = f"the adapter cannot be sent as a request ({path.reason})"
        resync(owner, engine, state, reason, every_rank=every_rank)
    return None


def _disabled(path: AdapterPath) -> bool:
    return path.view is not None and path.view.disabled


def live_lora_request(model: object) -> LoraRequest | None:
    """The LoRARequest of the adapter as it is now, for rollouts that your own code starts.

    `llm.generate(prompts, lora_request=trlpatch.lora_request(model))`, on the engine attached to `model`.
    Wakes the engine, and hands the adapter over if it has moved. None while the adapter is disabled.

    Raises:
        AdapterNotExpressible: no engine is attached, or it cannot serve the adapter.
        StaleAdapter: the engine's weights were discarded.
        EngineBusy: another thread generates on it, or requests of another version of the adapter are unfinished.
    """
    engine = attached_engine(model)
    if engine is None:
        raise AdapterNotExpressible(
            f"trlpatch.lora_request: no engine is attached to this {type(model).__name__}; "
            "call trlpatch.attach_engine(model, llm) first"
        )
    return current_request(model, engine, "trlpatch.lora_request")
