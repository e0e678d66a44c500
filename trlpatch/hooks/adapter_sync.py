"""Weight sync hook, where TRL synchronises weights.

Hand the adapter over; or write the policy's weights into the engine's; or let TRL push every weight.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

from trlpatch.engine import lora_limits, publisher
from trlpatch.engine.probes import WEIGHTS
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.rank_agreement import agreed_reason
from trlpatch.engine.sleep import wake
from trlpatch.engine.state import EngineState, state_of
from trlpatch.engine.weights_in_place.reload import push_refusal
from trlpatch.engine.weights_publisher import write_policy
from trlpatch.errors import AdapterNotExpressible, CannotShare, EngineMismatch, SharedWeights, StaleAdapter
from trlpatch.hooks.protocols import Owner
from trlpatch.hooks.trainers import engine_of, model_of, own_sync, serves_remotely
from trlpatch.log import log_once
from trlpatch.options import active
from trlpatch.policy.adapter import LoraView, base_of, lora_view
from trlpatch.policy.base_parameters import contents
from trlpatch.policy.sharding import split_over_ranks


@dataclass(frozen=True)
class AdapterPath:
    """Whether rollouts of one owner can carry its adapter as a request; `reason` is None when they can."""

    view: LoraView | None
    reason: str | None

    @property
    def live(self) -> bool:
        """Do rollouts carry the adapter?"""
        return self.view is not None and self.reason is None


def adapter_path(owner: Owner, engine: RolloutEngine, *, every_rank: bool = True) -> AdapterPath:
    """Decide between a LoRA request and TRL's own sync; the engine's weights must be awake.

    `every_rank`: all ranks are in this call, as where TRL itself calls. With a sharded adapter they agree, then.

    Meanwhile the device hands over what was handed over last, which is nearly always what there is to hand over.
    """
    underway = publisher.start(engine)
    view = lora_view(model_of(owner))
    if view is None:
        return AdapterPath(None, "the model has no PEFT adapter (full fine-tuning)")
    if active().adapter == "off":
        return AdapterPath(view, 'adapter="off"')
    if active().adapter == "merge":
        return AdapterPath(view, 'adapter="merge"')
    view = view.snapshot(underway, every_rank=every_rank)
    return AdapterPath(view, agreed_reason(view, engine, lora_limits.unsupported_reason(view, engine)))


def hand_over(owner: Owner, *, every_rank: bool = True) -> bool:
    """Replace TRL's weight sync: True when the engine has the policy, False when TRL must push weights.

    The policy is handed over as an adapter, or for full fine-tuning, for adapters that vLLM cannot serve and with
    adapter="merge" written into the engine's weights. False in server mode, with adapter="off" and where these cannot
    be written; the reasons are logged once per owner. A sleeping engine's weights are woken first: TRL 0.28.0 syncs
    before it wakes, into unmapped memory. The adapter is handed over whether or not it seems to have changed.

    Raises:
        AdapterNotExpressible: with adapter="request", for whatever no request can carry; with adapter="merge", where
            weights cannot be written.
        SharedWeights: instead of False, when the engine computes with the trainer's own weights: merged ones must not
            be pushed there.
        EngineMismatch: instead of False, when the engine has LoRA layers that the loader of its vLLM does not know.
        EngineBusy: another thread generates on the engine.
    """
    engine = engine_of(owner)
    if engine is None or serves_remotely(owner):
        return False
    doing = f"synchronising {type(owner).__name__}"
    with state_of(engine).occupancy.handing_over(engine.llm_engine, doing, abort=True):
        return _hand_over(owner, engine, every_rank)


def _hand_over(owner: Owner, engine: RolloutEngine, every_rank: bool) -> bool:
    state = state_of(engine)
    wake(engine, state, WEIGHTS)
    path = adapter_path(owner, engine, every_rank=every_rank)
    reason = path.reason
    if path.view is not None and reason is None:
        try:
            publisher.publish(path.view, path.view.base, engine)
            return True
        except AdapterNotExpressible as error:
            reason = str(error)
            lora_limits.refuse(path.view, state, reason)
    if active().adapter == "request":
        raise AdapterNotExpressible(
            f'synchronising {type(owner).__name__} with adapter="request": {reason}; expected a LoRA adapter '
            'that vLLM can serve; use PatchFastRL(adapter="auto") to let full weights be written instead'
        )
    if active().adapter in ("auto", "merge"):
        refused = write_policy(model_of(owner), engine)
        if refused is None:
            _say(owner, path, f"every weight is written into the engine in place: {reason}")
            return True
        reason = f"{reason}; weights cannot be written in place: {refused}"
    if active().adapter == "merge" and not state.shared_weights:
        raise AdapterNotExpressible(
            f"synchronising {type(owner).__name__} with {reason}; expected an engine of dense weights in this "
            'process; use PatchFastRL(adapter="auto")'
        )
    _refuse_to_push(owner, state, str(reason))
    _refuse_lora_engine(owner, state, str(reason))
    _refuse_alone(owner, str(reason), every_rank)
    _say(owner, path, f"TRL's own full-weight sync runs instead of LoRA requests: {reason}")
    state.backend.before_weight_push()
    state.policy_pushed()
    base = base_of(model_of(owner))
    if path.view is None and base in state.attached_to:  # it has `fast_generate`, which asks for them
        state.weights_pushed = weakref.ref(base), contents(base)
    return False


def _say(owner: Owner, path: AdapterPath, what: str) -> None:
    expected = path.view is None or active().adapter in ("off", "merge")
    log_once(owner, f"{type(owner).__name__}: {what}", level=logging.INFO if expected else logging.WARNING)


def _refuse_to_push(owner: Owner, state: EngineState, why: str) -> None:
    if state.shared_weights:
        raise SharedWeights(
            f"synchronising {type(owner).__name__}: TRL would push full weights ({why}) into an engine whose base "
            "weights are the trainer's own, and change what it trains on; expected a LoRA adapter that vLLM can "
            "serve. Use one, or load the model separately and call trlpatch.attach_engine(model, llm)"
        )


def _refuse_lora_engine(owner: Owner, state: EngineState, why: str) -> None:
    try:
        refusal = push_refusal(state.backend.worker_model())
    except CannotShare:  # its model is in another process
        return
    if refusal is not None:
        raise EngineMismatch(
            f"synchronising {type(owner).__name__}: TRL has to push every weight ({why}) into an engine that was "
            f"built with enable_lora=True, and it cannot: {refusal}; expected a plain LoRA adapter, which a request "
            "carries, or an engine without LoRA. Build it with vllm.LLM(model=...), without enable_lora, or leave it "
            "to TRL (use_vllm=True, and no engine on the model)"
        )


def _refuse_alone(owner: Owner, why: str, every_rank: bool) -> None:
    if not every_rank and split_over_ranks(base_of(model_of(owner))):
        raise StaleAdapter(
            f"a request made while {type(owner).__name__} runs would not use the current policy: {why}, and its "
            "parameters are sharded: a weight sync takes every rank, and this call may be one rank's alone; expected "
            "a call after the trainer's own rollout and before the next optimizer step"
        )


def resync(owner: Owner, engine: RolloutEngine, state: EngineState, why: str, *, every_rank: bool = True) -> None:
    """Run the owner's own (patched) sync now, because the engine does not hold the policy.

    Raises:
        StaleAdapter: the owner has no sync, or its sync did not help; or its parameters are sharded, and the other
            ranks are not known to be here.
        SharedWeights: the engine computes with the trainer's own weights.
    """
    _refuse_to_push(owner, state, why)
    _refuse_alone(owner, why, every_rank)
    sync = own_sync(owner)
    if sync is None or state.syncing:
        raise StaleAdapter(
            f"a rollout of {type(owner).__name__} would not use the current policy: {why}, and it has no weight sync "
            "to run; expected an attached engine (it keeps its weights) or a trainer with its own sync"
        )
    log_once(
        owner,
        f"{type(owner).__name__}: weights are synchronised again before this rollout: {why}",
        level=logging.DEBUG,
    )
    state.syncing = True
    try:
        sync()
    finally:
        state.syncing = False
    if state.weights_lost:
        raise StaleAdapter(
            f"a rollout of {type(owner).__name__} would not use the current policy: {why}, and its sync pushed "
            "nothing; check that the `adapter_sync` patch is applied: trlpatch.status()"
        )
