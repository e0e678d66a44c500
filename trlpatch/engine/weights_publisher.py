"""Put a model's policy into an engine's weights, and tell whether it is there."""

from __future__ import annotations

import weakref

from trlpatch.engine import guards, probes
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.same_model import vocabulary_of
from trlpatch.engine.sharing.eligibility import layout_reason
from trlpatch.engine.state import EngineState, WrittenPolicy, state_of
from trlpatch.engine.weights_in_place.plan import NotInPlace
from trlpatch.engine.weights_in_place.writer import WeightsWriter
from trlpatch.errors import EngineBusy, StaleAdapter
from trlpatch.log import logger
from trlpatch.policy.adapter import base_of, lora_view
from trlpatch.policy.content_mark import ContentMark
from trlpatch.policy.policy_weights import NotMergeable, policy_weights


def holds_policy(model: object, engine: RolloutEngine) -> bool:
    """Are the engine's weights those that the model computes with now? By content; waits for the device."""
    state = state_of(engine)
    written = state.written
    if state.policy_location != "weights" or state.torn or state.weights_lost or written is None:
        return False
    if written.model() is not base_of(model):
        return False
    try:
        return written.mark == ContentMark(policy_weights(model), written.model())
    except NotMergeable:
        return False


def write_policy(model: object, engine: RolloutEngine, *, adapters: bool = True) -> str | None:
    """Write every weight of the model into the engine, whose weights must be awake; why not, when that cannot be.

    `adapters=False` writes the model without its adapters. After an interrupt the engine answers no request until a
    write is complete.

    Raises:
        EngineBusy: requests are unfinished; nothing was written. Or prefixes of the version before are in use.
    """
    state = state_of(engine)
    if state.shared_weights:
        return "the engine's weights are the trainer's own"
    base = base_of(model)
    own, inside = vocabulary_of(base), probes.vocabulary_size(engine)
    if None not in (own, inside) and own != inside:  # vLLM's loaders assert what they load, and say nothing of it
        return f"the model has a vocabulary of {own} tokens, the engine of {inside}"
    transfer = state.backend.weight_transfer()
    plan, unproven = None, False
    try:
        weights = policy_weights(model, adapters=adapters)
        if transfer is None:
            plan = _writer(state).known(base, weights)
            if plan is None:
                reason = layout_reason(engine)
                if reason is not None:
                    return reason
                plan, unproven = _writer(state).plan(base, weights)
    except (NotMergeable, NotInPlace) as refusal:
        return str(refusal)
    _require_idle(state)
    guards.install(engine, state)
    before, state.torn = state.torn, True
    state.written = state.published = None
    reason = None
    try:
        copies = {} if plan is None or unproven else _writer(state).copies(weights, plan)
        # Before all other copies, or of what these have read: a later change must not look written.
        mark = ContentMark(weights, base, copies)
        if transfer is not None:
            reason = transfer.send(weights)
        elif plan is None:
            _writer(state).reload(weights, probes.model_config(engine))
        else:
            _writer(state).write(base, weights, plan, unproven=unproven, copied=copies)
    except NotInPlace as refusal:
        reason = str(refusal)
    if reason is not None:
        state.torn = before
        return reason
    if transfer is None and not state.backend.reset_prefix_cache():  # engines that are sent weights reset their own
        raise EngineBusy(
            "writing weights in place: vLLM could not reset its prefix cache, because blocks of it are in use; "
            "rollouts would continue prefixes of other weights. Finish or abort the requests first"
        )
    state.policy_location = "weights"
    state.written = WrittenPolicy(mark, weakref.ref(base))
    state.weights_pushed = None
    state.weights_lost = state.torn = False
    return None


def start_policy(model: object, engine: RolloutEngine) -> bool:
    """Begin to send the model's policy to engines elsewhere, beside what the caller does; False where there is no way.

    For the time between the last optimizer step and the next rollout, whose `write_policy` waits for it. Requests
    meanwhile are answered with the new weights.
    """
    transfer = state_of(engine).backend.weight_transfer()
    if transfer is None:
        return False
    try:
        return transfer.start(policy_weights(model)) is None
    except NotMergeable:
        return False


def _writer(state: EngineState) -> WeightsWriter:
    if state.weights_writer is None:
        state.weights_writer = WeightsWriter(state.backend)
    return state.weights_writer


def refresh(model: object, engine: RolloutEngine) -> None:
    """Write the model's policy unless the engine has it.

    Raises:
        StaleAdapter: it cannot be written any more.
        EngineBusy: as `write_policy`.
    """
    if holds_policy(model, engine):
        return
    reason = write_policy(model, engine)
    if reason is not None:
        raise StaleAdapter(
            f"the engine's weights are a policy that was written in place, and that of this {type(model).__name__} "
            f"cannot be: {reason}; roll out from a trainer, whose own sync pushes every weight"
        )


def write_base(model: object, engine: RolloutEngine) -> None:
    """Write the model without its adapters; nothing without PEFT, where there is no other than the policy.

    Raises:
        StaleAdapter: as `refresh`.
        EngineBusy: as `write_policy`.
    """
    if lora_view(model) is None:
        return
    reason = write_policy(model, engine, adapters=False)
    if reason is not None:
        raise StaleAdapter(
            f"the base model was asked for, but the engine's weights are a merged policy, and those of the base "
            f"cannot be written back: {reason}"
        )


def give_back_base(model: object, engine: RolloutEngine) -> None:
    """As `write_base` where the engine's weights are a merged policy; a warning where they cannot be written."""
    state = state_of(engine)
    if state.policy_location != "weights" or lora_view(model) is None:
        return
    try:
        if state.backend.asleep():
            raise StaleAdapter("the engine sleeps")
        write_base(model, engine)
    except (EngineBusy, StaleAdapter) as error:
        logger.warning("detach_engine: the engine keeps the weights of a merged policy: %s", error)


def _require_idle(state: EngineState) -> None:
    state.backend.before_weight_push()
    if state.backend.unfinished():
        raise EngineBusy(
            "writing weights in place: requests are unfinished, and their completions would be of two policies; "
            "nothing was changed; let generate() return, or abort them with llm.llm_engine.abort_request(...)"
        )
