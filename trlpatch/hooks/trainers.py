"""Finding one's way in what TRL passes to a hook.

An owner is a trainer or a `VLLMGeneration` (TRL 0.28 and newer): `.model`, an engine under `.llm` or
`.vllm_engine` (GOLD below 1.0), a mode under `.vllm_mode` or `.mode`, and for trainers `.args`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

_args_of_generation: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_under_construction: list[Any] = []

# Their rollouts do not run on the engine that they inherit (facts of NashMD and XPO up to TRL 1.13): never
# touched.
_NEVER = frozenset({"NashMDTrainer", "XPOTrainer"})


def never_touched(trainer: object) -> bool:
    """Is it a NashMD or XPO trainer, or made from one?"""
    return any(cls.__name__ in _NEVER for cls in type(trainer).__mro__)


def generation_of(owner: Any) -> Any:
    """The object that owns the engine: the trainer's `VLLMGeneration`, else the owner itself."""
    inner = getattr(owner, "vllm_generation", None)
    return owner if inner is None else inner


def engine_of(owner: Any) -> Any:
    """The in-process engine, or None (server mode, or transformers generation)."""
    holder = generation_of(owner)
    for name in ("llm", "vllm_engine"):
        found = getattr(holder, name, None)
        if found is not None:
            return found
    return None


def model_of(owner: Any) -> Any:
    """The training model, wrapped as the owner has it."""
    found = getattr(owner, "model", None)
    return found if found is not None else getattr(generation_of(owner), "model", None)


def serves_remotely(owner: Any) -> bool:
    """True in server mode, where the weights go over HTTP and there is no engine here to ask."""
    holder = generation_of(owner)
    mode = getattr(holder, "vllm_mode", None) or getattr(holder, "mode", None) or getattr(owner, "vllm_mode", None)
    return mode == "server"


def own_sync(owner: Any) -> Callable[[], Any] | None:
    """TRL's own weight sync of this owner; None where it has no method for it (OnlineDPO below 0.23)."""
    for holder in (generation_of(owner), owner):
        for name in ("sync_weights", "_move_model_to_vllm"):
            found = getattr(holder, name, None)
            if callable(found):
                sync: Callable[[], Any] = found
                return sync
    return None


def args_of(owner: Any) -> Any:
    """The trainer's arguments: the owner's own, or bound to it; a config is its own arguments."""
    found = getattr(owner, "args", None)
    if found is not None:
        return found
    if hasattr(owner, "vllm_sampling_params"):
        return owner
    try:
        bound = _args_of_generation.get(owner)
    except TypeError:
        bound = None
    if bound is not None:
        return bound
    return _under_construction[-1] if _under_construction else None


def binding(args: Any, build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, with the object that it makes bound to `args`, already while its constructor runs."""

    def construct(*positional: Any, **named: Any) -> Any:
        _under_construction.append(args)
        try:
            made = build(*positional, **named)
        finally:
            _under_construction.pop()
        _args_of_generation[made] = args
        return made

    return construct
