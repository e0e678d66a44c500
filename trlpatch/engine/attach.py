"""Give a model what patched trainers look for: an engine of its own and a live adapter request."""

from __future__ import annotations

import contextlib
import os
import types
from pathlib import Path
from typing import Any, TypeVar

from trlpatch.engine import live, probes
from trlpatch.engine.lora_view import base_of, lora_view, unwrap
from trlpatch.engine.state import forget, state_of
from trlpatch.errors import EngineMismatch, NotAnEngine

_ENGINE = "vllm_engine"
_METHODS = ("load_lora", "fast_generate")
_LIVE: Any = object()
_FIRST_DISK_ID = 1_600_000_000

Model = TypeVar("Model")


def attach_engine(model: Model, llm: Any, *, shared_weights: bool = False) -> Model:
    """Make `llm` the engine that trainers of `model` roll out on, and return the model.

    Sets `model.vllm_engine`, `model.load_lora` and `model.fast_generate`. They are put on the transformers
    model under PEFT, so they are visible through PEFT models made of it before or after, and survive
    `merge_and_unload()`. A `copy.deepcopy` of the model shares the engine. `shared_weights=True` says that
    the engine computes with the trainer's own weight storage; such an engine is never put to sleep.

    Raises NotAnEngine for anything but an in-process engine, EngineMismatch for one that is asleep.
    """
    if isinstance(model, (str, os.PathLike)) or not callable(getattr(model, "named_modules", None)):
        raise NotAnEngine(
            "attach_engine(model, llm): model must be a loaded transformers or PEFT model, got "
            f"{type(model).__name__}; "
            "load it first, e.g. AutoModelForCausalLM.from_pretrained(...)"
        )
    if not probes.looks_like_engine(llm):
        raise NotAnEngine(
            f"attach_engine(model, llm): llm must be a vllm.LLM (it has `generate` and `llm_engine`), got "
            f"{type(llm).__name__}; build one with vllm.LLM(model=..., enable_lora=True)"
        )
    sleeping = probes.sleeping_tags(llm)
    if sleeping:
        raise EngineMismatch(
            f"attach_engine(model, llm): the engine sleeps ({', '.join(sorted(sleeping))}); it must be awake to be "
            "attached: call llm.wake_up() first"
        )
    base = base_of(model)
    state = state_of(llm)
    state.attached = True
    state.shared_weights = shared_weights
    share_in_copies(llm)
    setattr(base, _ENGINE, llm)
    base.load_lora = types.MethodType(_load_lora, base)
    base.fast_generate = types.MethodType(_fast_generate, base)
    return model


def detach_engine(model: Any) -> Any:
    """Undo `attach_engine`; returns the engine that was attached (still running), or None."""
    base = base_of(model)
    llm = base.__dict__.pop(_ENGINE, None)
    for name in _METHODS:
        base.__dict__.pop(name, None)
    if llm is not None:
        with contextlib.suppress(AttributeError):
            del llm.__deepcopy__
        forget(llm)
    return llm


def attached_engine(model: Any) -> Any:
    """The engine a model carries (ours, or one set by another library as `model.vllm_engine`), or None."""
    if model is None or isinstance(model, (str, os.PathLike)):
        return None
    for holder in (model, unwrap(model), base_of(model)):
        found = getattr(holder, _ENGINE, None)
        if found is not None and probes.looks_like_engine(found):
            return found
    return None


def share_in_copies(llm: Any) -> None:
    """TRL deep-copies models to make reference models; an engine cannot be copied and need not be."""
    llm.__deepcopy__ = types.MethodType(_same_object, llm)


def _same_object(self: Any, memo: Any) -> Any:
    return self


def _load_lora(self: Any, name: str | None = None, load_tensors: bool | None = None) -> Any:
    """A LoRARequest: of the live adapter, or of an adapter saved in the directory `name`.

    `load_tensors=True`, or no arguments: the adapter of this model as it is now. `load_tensors=False`, or a
    `name` that is an adapter directory: that one, from disk. Raises ValueError when `name` has to be a
    directory and is none.
    """
    live_adapter = name is None if load_tensors is None else load_tensors
    if live_adapter:
        return live.require_request(self, attached_engine(self))
    directory = Path(name or "")
    if name is None or not (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"model.load_lora({name!r}): expected a directory with adapter_config.json, found none; save the adapter "
            "with model.save_pretrained(directory), or call model.load_lora() for the live adapter"
        )
    from vllm.lora.request import LoRARequest

    # vLLM keys adapters by id: a directory that was saved again needs another one.
    saved = max(path.stat().st_mtime_ns for path in directory.iterdir())
    counter = state_of(attached_engine(self)).disk_adapters
    number = counter.setdefault(f"{directory.resolve()}@{saved}", len(counter) + 1)
    return LoRARequest(
        lora_name=f"{directory.name}-{number}",
        lora_int_id=_FIRST_DISK_ID + number,
        lora_path=str(directory.resolve()),
    )


def _fast_generate(self: Any, *args: Any, lora_request: Any = _LIVE, **kwargs: Any) -> Any:
    """`llm.generate(...)` with the live adapter; `lora_request=None` rolls out with the base model."""
    llm = attached_engine(self)
    if lora_request is _LIVE:
        lora_request = None if lora_view(self) is None else live.require_request(self, llm)
    return llm.generate(*args, lora_request=lora_request, **kwargs)
