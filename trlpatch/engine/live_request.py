"""Supply the live LoRA request, of the adapter as it is now, to code with a model and an engine but no trainer."""

from __future__ import annotations

from trlpatch.engine import lora_limits, publisher
from trlpatch.engine import weights_publisher as in_place
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.engine.sleep import wake
from trlpatch.engine.state import EngineState, state_of
from trlpatch.errors import AdapterNotExpressible, StaleAdapter
from trlpatch.options import active
from trlpatch.policy.adapter import lora_view


def refuse_lost_weights(state: EngineState) -> None:
    """Raise StaleAdapter when the engine, awake, has undefined weights: with any adapter, and with none."""
    if state.weights_lost:
        raise StaleAdapter(
            "a live adapter request was asked for, but a level-2 sleep discarded the engine's weights and only the "
            "trainer can push them: roll out from the trainer, or attach an engine (it sleeps at level 1)"
        )


def require_request(model: object, engine: RolloutEngine) -> LoraRequest | None:
    """Wake the engine and return the live adapter's LoRARequest, handing the adapter over if it moved.

    None while the adapter is disabled (the policy is the base model then), and where the policy is in the engine's
    weights, written there when it moved: with adapter="merge", or with "auto" where no request can carry it.

    Raises:
        AdapterNotExpressible: the engine cannot serve the adapter.
        StaleAdapter: a level-2 sleep discarded the engine's weights, or the adapter moves while it is handed over.
    """
    state = state_of(engine)
    wake(engine, state, "weights")
    merging = active().adapter == "merge" and lora_view(model) is not None
    if state.policy_location == "weights" or state.torn or merging:
        in_place.refresh(model, engine)
        wake(engine, state, "kv_cache")
        return None
    refuse_lost_weights(state)
    wake(engine, state, "kv_cache")
    underway = publisher.start(engine)
    view = lora_view(model)
    view = None if view is None else view.snapshot(underway)
    reason = "it has no PEFT adapter" if view is None else lora_limits.unsupported_reason(view, engine)
    if view is None or reason is not None:
        also = "" if view is None or active().adapter != "auto" else in_place.write_policy(model, engine)
        if also is None:
            return None
        raise AdapterNotExpressible(
            f"a live LoRA request was asked for {type(model).__name__}, but vLLM cannot serve it: {reason}"
            + (f"; nor can its weights be written in place: {also}" if also else "")
        )
    if view.disabled:
        return None
    request = publisher.current_request(view, view.base, engine)
    if request is None:
        publisher.publish(view, view.base, engine)
        request = publisher.current_request(view.snapshot(), view.base, engine)  # waits until it has arrived
    if request is None:
        raise StaleAdapter(
            f"a live adapter request was asked for {type(model).__name__}, but the adapter changed, or was evicted, "
            "while it was handed over; do not train it from another thread while it generates"
        )
    return request
