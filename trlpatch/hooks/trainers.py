"""Find the engine, the model and the arguments in what TRL passes to a hook.

An owner is a trainer or a `VLLMGeneration` (TRL 0.28 and newer): `.model`, an engine under `.llm` or
`.vllm_engine` (GOLD below 1.0), a mode under `.vllm_mode` or `.mode`, and for trainers `.args`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trlpatch.engine.protocols import RolloutEngine
from trlpatch.hooks.protocols import TrainerArguments
from trlpatch.trl_names import ENGINE_ATTRIBUTES, LEFT_ALONE_TRAINERS, SYNC_METHODS

if TYPE_CHECKING:
    from torch.nn import Module

T = TypeVar("T")

_args_of_generation: weakref.WeakKeyDictionary[object, TrainerArguments] = weakref.WeakKeyDictionary()
_under_construction: list[TrainerArguments] = []


def is_excluded_trainer(trainer: object) -> bool:
    """Is it a NashMD or XPO trainer, or made from one? Their rollouts do not run on the engine that they inherit."""
    return any(cls.__name__ in LEFT_ALONE_TRAINERS for cls in type(trainer).__mro__)


def generation_of(owner: object) -> object:
    """The object that owns the engine: the trainer's `VLLMGeneration`, else the owner itself."""
    inner = getattr(owner, "vllm_generation", None)
    return owner if inner is None else inner


def engine_of(owner: object) -> RolloutEngine | None:
    """The in-process engine, or None (server mode, or transformers generation)."""
    holder = generation_of(owner)
    for name in ENGINE_ATTRIBUTES:
        found: RolloutEngine | None = getattr(holder, name, None)
        if found is not None:
            return found
    return None


def model_of(owner: object) -> Module | None:
    """The training model, wrapped as the owner has it."""
    found = getattr(owner, "model", None)
    return found if found is not None else getattr(generation_of(owner), "model", None)


def serves_remotely(owner: object) -> bool:
    """True in server mode, where the weights go over HTTP and there is no engine here to ask."""
    holder = generation_of(owner)
    mode = getattr(holder, "vllm_mode", None) or getattr(holder, "mode", None) or getattr(owner, "vllm_mode", None)
    return bool(mode == "server")


def own_sync(owner: object) -> Callable[[], object] | None:
    """TRL's own weight sync of this owner; None where it has no method for it (OnlineDPO below 0.23)."""
    for holder in (generation_of(owner), owner):
        for name in SYNC_METHODS:
            found = getattr(holder, name, None)
            if callable(found):
                sync: Callable[[], object] = found
                return sync
    return None


def args_of(owner: object) -> Any:
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


def binding(args: TrainerArguments, build: Callable[..., T]) -> Callable[..., T]:
    """`build`, with the object that it makes bound to `args`, already while its constructor runs."""

    def construct(*positional: object, **named: object) -> T:
        _under_construction.append(args)
        try:
            made = build(*positional, **named)
        finally:
            _under_construction.pop()
        _args_of_generation[made] = args
        return made

    return construct
