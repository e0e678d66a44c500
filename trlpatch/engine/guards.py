"""Guard the methods of one engine: what vLLM lets pass in silence is refused or put right; `remove` undoes it.

- a request without an adapter from a trainer's `rollout_func`: it would come from the base model.
- a request added to an engine that sleeps: the scheduler waits for ever, or a kernel reads unmapped memory.
- a sleep of level 1 or 2 while a trainer shares the weights: its next forward pass reads unmapped memory.
- a deeper sleep asked of an engine whose KV cache alone sleeps: vLLM calls it asleep already and keeps the weights.
- `wake_up()` after a KV-only sleep: up to 0.27 it maps the mapped weights again; and `wake_up` of several tags of
  which one is awake does nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.state import EngineState
from trlpatch.errors import EngineAsleep, SharedWeights


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
        if state.adapter_sync is not None:
            state.adapter_sync.invalidate()
        if state.policy_location == "adapter":
            state.policy_location = "checkpoint"


class Guards:
    """The guarded methods of one engine; instance attributes, so that other engines keep vLLM's own."""

    def __init__(self, engine: RolloutEngine, state: EngineState) -> None:
        self._inner = engine.llm_engine
        self._state = state
        self._backend = state.backend
        self._replaced: list[tuple[object, str, object, object]] = []
        self._replace(self._inner, "add_request", self._add_request)
        self._replace(self._inner, "sleep", self._sleep)
        self._replace(self._backend.wakes, "wake_up", self._backend.guarded_wake)

    def remove(self) -> None:
        """Give the objects their own methods back. Where somebody has replaced ours since, theirs stays."""
        for target, name, before, ours in self._replaced:
            if vars(target).get(name) is ours:
                if before is None:
                    delattr(target, name)
                else:
                    setattr(target, name, before)

    def _replace(self, target: object, name: str, guard: Callable[..., Any]) -> None:
        original = getattr(target, name, None)
        if not callable(original):
            return

        @wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return guard(original, *args, **kwargs)

        self._replaced.append((target, name, vars(target).get(name), guarded))
        setattr(target, name, guarded)

    def _add_request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._state.live_request is not None and kwargs.get("lora_request") is None:
            kwargs["lora_request"] = self._state.live_request()
        sleeping = self._backend.unmapped()
        if sleeping:
            raise EngineAsleep(
                f"a request for an engine that is asleep ({', '.join(sorted(sleeping))} unmapped): wake it with "
                "llm.wake_up(), or roll out with model.fast_generate(...) or "
                "lora_request=trlpatch.lora_request(model), which wake it"
            )
        return original(*args, **kwargs)

    def _sleep(self, original: Callable[..., Any], level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level < 1:
            return original(level, *args, **kwargs)
        if self._state.shared_weights:
            raise SharedWeights(
                f"sleep(level={level}) of an engine whose weights are the trainer's own: it would unmap them under "
                "the trainer. A patched trainer gives back the KV cache alone; by hand: "
                "trlpatch.engine.sleep.put_to_sleep(llm, trlpatch.engine.state.state_of(llm), 1)"
            )
        sleeping = self._backend.unmapped()
        if WEIGHTS in sleeping:  # vLLM ignores it, whatever the level
            return original(level, *args, **kwargs)
        if sleeping == {KV_CACHE}:
            self._inner.wake_up([KV_CACHE])
        self._backend.drain()
        result = original(level, *args, **kwargs)
        slept(self._state, level)
        return result
