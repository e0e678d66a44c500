"""LoRA limits of one engine: can it serve this adapter as a LoRA request?"""

from __future__ import annotations

import weakref

from trlpatch.engine import probes
from trlpatch.engine.beside_weights import beside_mismatch
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.state import BaseVerdict, EngineState, state_of
from trlpatch.policy import base_parameters, base_weights, lora_support
from trlpatch.policy.adapter import LoraView

MAX_CPU_LORAS = 8
"""`max_cpu_loras` of engines that trlpatch asks for: adapters in vLLM's registry, of which one is the live one.

vLLM's default is `max_loras`, 1: a saved adapter in the same call evicts the live one, which no file can bring back.
A saved adapter takes host memory when it is used, the limit itself takes none.
"""

_REFUSED = "refused by an engine"
"""Key in `LoraWeights.derived`."""


def unsupported_reason(view: LoraView, engine: RolloutEngine) -> str | None:
    """Why rollouts of this engine cannot carry the adapter as a request; None when they can.

    The engine's weights must be awake: they are compared with those under the adapter.
    """
    reason = lora_support.unsupported_reason(view)
    if reason is not None:
        return reason
    if not probes.lora_enabled(engine):
        return "the engine was built without enable_lora=True"
    rank, limit = lora_support.rank_of(view), probes.max_lora_rank(engine)
    if rank > limit:
        return f"its rank {rank} is above the engine's max_lora_rank={limit}"
    state = state_of(engine)
    if state.policy_location == "policy":
        return "the engine's base weights were replaced by a full-weight sync"
    if state.policy_location == "weights":
        return "the engine's base weights are a policy that was written in place"
    if state.torn:
        return "the engine's base weights are half-written"
    if state.shared_weights and (not state.sharers or view.base in state.sharers):
        return "it is merged into the base weights, which the engine shares" if view.merged else None
    return _refused(view, state) or _base_verdict(view, engine, state)


def refuse(view: LoraView, state: EngineState, reason: str) -> None:
    """Remember why the engine did not take the active adapter: it will not while the adapter has these tensors."""
    view.weights(view.active[0]).derived[_REFUSED] = (weakref.ref(state), reason)


def _refused(view: LoraView, state: EngineState) -> str | None:
    of, reason = view.weights(view.active[0]).derived.get(_REFUSED, (lambda: None, None))
    return reason if of() is state else None


def _base_verdict(view: LoraView, engine: RolloutEngine, state: EngineState) -> str | None:
    beside = base_parameters.beside_mark(view)  # first: `base_mark` waits for a copy that is underway
    mark = (base_weights.base_mark(view), beside)
    verdict = state.base_verdict.get(view.found)
    if verdict is None or verdict.mark != mark:
        known = state.weights_attached.get(view.base)
        mismatch = (
            state.backend.base_mismatch(view)
            or base_weights.changed_since(known, view)
            or base_parameters.changed_beside(known, view)
            or (None if view.base in state.compared else beside_mismatch(view, engine))
        )
        verdict = state.base_verdict[view.found] = BaseVerdict(mark, mismatch)
    return verdict.reason
