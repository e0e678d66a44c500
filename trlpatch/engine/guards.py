"""Guard the methods of one engine: what vLLM lets pass in silence is refused or put right; `remove` undoes it.

- a request without an adapter while a trainer runs, from its `rollout_func` or from whatever else it calls: it would
  come from the base model. It gets the adapter being trained, looked up once per call.
- a request for a version of the live adapter that has been replaced: its slot holds another one.
- any request while weights are half-written, and one for an adapter while they are a merged policy.
- a request for a saved adapter whose directory was rewritten before vLLM has read it.
- a call that fails or is interrupted: the requests that it leaves would be answered to the next caller.
- a request added to an engine that sleeps: the scheduler waits for ever, or a kernel reads unmapped memory.
- a sleep of level 1 or 2 while a trainer shares the weights: its next forward pass reads unmapped memory.
- a deeper sleep asked of an engine whose KV cache alone sleeps: vLLM calls it asleep already and keeps the weights.
- `wake_up()` after a KV-only sleep: up to 0.27 it maps the mapped weights again; and `wake_up` of several tags of
  which one is awake does nothing at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync.registry import LIVE_NAME
from trlpatch.engine.occupancy import Call
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.engine.saved_adapter import refuse_rewritten
from trlpatch.engine.state import EngineState
from trlpatch.errors import EngineAsleep, SharedWeights, StaleAdapter

_CALLS = ("generate", "chat", "beam_search", "encode", "embed", "classify", "reward", "score", "wait_for_completion")
"""Methods of `vllm.LLM` that return when their requests are answered."""
_PROMPT, _LORA_REQUEST = 1, 4
"""Their places among the positional arguments of `LLMEngine.add_request`."""


def install(engine: RolloutEngine, state: EngineState) -> None:
    """Guard this engine, once; it stays guarded until `state.guards.remove()` (detach_engine does that)."""
    if state.guards is None:
        state.guards = Guards(engine, state)


def slept(state: EngineState, level: int) -> None:
    """Both pools are unmapped now; level 2 has lost the weights, and with them (up to vLLM 0.32) LoRA buffers."""
    state.backend.mark_asleep()
    if level >= 2:
        state.weights_lost = True
        state.published = None
        state.written = None
        if state.adapter_sync is not None:
            state.adapter_sync.invalidate()
        if state.policy_location == "adapter":
            state.policy_location = "checkpoint"


def _itself(target: object) -> object:
    return target


class Guards:
    """The guarded methods of one engine; instance attributes, so that other engines keep vLLM's own."""

    def __init__(self, engine: RolloutEngine, state: EngineState) -> None:
        self._inner = engine.llm_engine
        self._state = state
        self._backend = state.backend
        self._engine = weakref.ref(engine)  # the state that holds this must not keep the engine alive
        self._replaced: list[tuple[Callable[[], object], str]] = []
        for name in _CALLS:
            self._replace(engine, name, self._call)
        self._replace(self._inner, "add_request", self._add_request)
        self._replace(self._inner, "sleep", self._sleep)
        self._replace(self._backend.wakes, "wake_up", self._backend.guarded_wake)

    def remove(self) -> None:
        """Give the objects their own methods back. Where somebody has replaced ours since, theirs stays."""
        for find, name in self._replaced:
            target = find()
            ours: Any = None if target is None else vars(target).get(name)
            if getattr(ours, "guarded_by", None) is not self:
                continue
            if ours.before is None:
                delattr(target, name)
            else:
                setattr(target, name, ours.before)

    def _replace(self, target: object, name: str, guard: Callable[..., Any]) -> None:
        original = getattr(target, name, None)
        if not callable(original):
            return

        def guarded(*args: Any, **kwargs: Any) -> Any:
            return guard(original, *args, **kwargs)

        if hasattr(original, "__name__"):
            guarded = wraps(original)(guarded)
        guarded.guarded_by, guarded.before = self, vars(target).get(name)  # type: ignore[attr-defined]
        find = self._engine if target is self._engine() else partial(_itself, target)
        self._replaced.append((find, name))
        setattr(target, name, guarded)

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._state.occupancy.call(self._inner):
            return original(*args, **kwargs)

    def _add_request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._state.occupancy.adding(self._inner)
        prompt: Any = args[_PROMPT] if len(args) > _PROMPT else kwargs.get("prompt")
        # An `EngineCoreRequest` carries its LoRA request, and vLLM does not look at the argument then. In releases
        # between 0.10 and 0.23 `LLM` makes one of every prompt; `add_request` takes one from anybody.
        given = getattr(prompt, "lora_request", None)
        if given is None:
            given = args[_LORA_REQUEST] if len(args) > _LORA_REQUEST else kwargs.get("lora_request")
        self._refuse_torn()
        if given is not None:
            self._refuse_beside_merged(given)
            self._refuse_replaced(given)
            refuse_rewritten(given, self._inner, self._state)
        elif not self._state.on_purpose:
            supplied = self._supply(call)
            if supplied is not None and hasattr(prompt, "lora_request"):
                prompt.lora_request = supplied
            if supplied is not None and len(args) > _LORA_REQUEST:
                args = (*args[:_LORA_REQUEST], supplied, *args[_LORA_REQUEST + 1 :])
            elif supplied is not None:
                kwargs["lora_request"] = supplied
        sleeping = self._backend.unmapped()
        if sleeping:
            engine = self._engine()
            if engine is not None and not probes.sleep_enabled(engine):
                raise EngineAsleep(f"a request for an engine that is {probes.PAUSED}")
            raise EngineAsleep(
                f"a request for an engine that is asleep ({', '.join(sorted(sleeping))} unmapped): wake it with "
                "llm.wake_up(), or roll out with model.fast_generate(...) or "
                "lora_request=trlpatch.lora_request(model), which wake it"
            )
        return original(*args, **kwargs)

    def _supply(self, call: Call) -> LoraRequest | None:
        state = self._state
        if state.live_request is None and (state.bare_request is None or state.policy_location == "policy"):
            return None  # nobody trains on this engine, or its base weights are the policy
        # Replaced: requests by hand that were finished long ago, while another thread's are not.
        if call.open or self._successor(call.decided) is not None:
            engine = self._engine()
            if state.live_request is not None:
                call.decided = state.live_request()
            elif state.bare_request is not None and engine is not None:
                call.decided = state.bare_request(engine)
            else:
                call.decided = None
        return call.decided

    def _successor(self, given: LoraRequest | None) -> LoraRequest | None:
        """What the engine holds in the place of a version of the live adapter; None where it holds that one."""
        published = self._state.published
        name = "" if given is None else str(given.lora_name)
        if published is None or not name.startswith(LIVE_NAME) or name == published.request.lora_name:
            return None
        return published.request

    def _refuse_torn(self) -> None:
        if self._state.torn:
            raise StaleAdapter(
                "a request for an engine whose weights are half-written: writing them in place was interrupted, and "
                "its answers would be of no policy; roll out from the trainer or with model.fast_generate(...), which "
                "write all of them anew"
            )

    def _refuse_beside_merged(self, given: LoraRequest) -> None:
        if self._state.policy_location == "weights":
            raise StaleAdapter(
                f"a request for the adapter {given.lora_name!r}, while the engine's weights are a policy that was "
                "written in place: it would be added to what is merged already; expected no lora_request. For the "
                'base model and adapters on it use PatchFastRL(adapter="request")'
            )

    def _refuse_replaced(self, given: LoraRequest) -> None:
        held = self._successor(given)
        if held is None:
            return
        raise StaleAdapter(
            f"a request for {given.lora_name!r}, a version of the live adapter that the engine does not hold any "
            f"more: it has {held.lora_name!r} in its place; expected the request of the adapter as it is now: ask for "
            "it at every rollout, lora_request=trlpatch.lora_request(model), and do not keep it"
        )

    def _sleep(self, original: Callable[..., Any], level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level < 1:
            return original(level, *args, **kwargs)
        if self._state.shared_weights:
            raise SharedWeights(
                f"sleep(level={level}) of an engine whose weights are the trainer's own: it would unmap them under "
                "the trainer. A patched trainer gives back the KV cache alone; by hand: "
                "trlpatch.engine.sleep.put_to_sleep(llm, trlpatch.engine.state.state_of(llm), 1)"
            )
        with self._state.occupancy.handing_over(self._inner, f"sleep(level={level})"):
            return self._deeper(original, level, *args, **kwargs)

    def _deeper(self, original: Callable[..., Any], level: int, *args: Any, **kwargs: Any) -> Any:
        sleeping = self._backend.unmapped()
        if WEIGHTS in sleeping:  # vLLM ignores it, whatever the level
            return original(level, *args, **kwargs)
        if sleeping == {KV_CACHE}:
            self._inner.wake_up([KV_CACHE])
        self._backend.require_idle()
        self._backend.drain()
        result = original(level, *args, **kwargs)
        slept(self._state, level)
        return result
