"""Bare request hook: a request that names no adapter, made while a trainer runs, is one to the policy.

As in TRL itself, whose engine has the policy in its weights. A subclass that calls `self.llm.generate`, a callback, a
reward function and TRL's modules that no patch is for all do so.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.hooks.lora_request import one_ranks_request
from trlpatch.hooks.trainers import engine_of
from trlpatch.log import warn_once

_NOT_THE_CALLER = ("trlpatch", "vllm", "contextlib", "functools")
"""Packages whose frames lie between whoever asks and the engine."""


def bare_request(engine: RolloutEngine) -> LoraRequest | None:
    """The live adapter of the trainer that runs on `engine`, in this thread or another; None when none does.

    None, too, where the policy is the base model or in the base weights. Walks the stack: for requests only that name
    no adapter, once per call of the engine's API.

    Raises:
        StaleAdapter: as `one_ranks_request`; nothing has been sampled.
    """
    own = sys._getframe(1)
    trainer = _trainer_among(own, engine)
    if trainer is None:
        me = threading.get_ident()
        others = (frame for thread, frame in sys._current_frames().items() if thread != me)
        trainer = next((found for frame in others if (found := _trainer_among(frame, engine)) is not None), None)
    if trainer is None:
        return None
    where, name = _caller(own), type(trainer).__name__
    try:
        request = one_ranks_request(trainer, engine)
    except Exception as error:
        error.add_note(f"asked for without a lora_request while {name} runs, at {where}")
        raise
    if request is not None:
        warn_once(
            engine,
            f"{where} asks the engine of {name} without a lora_request: it gets the adapter being trained, as in TRL "
            "itself. Say lora_request=trlpatch.lora_request(model) to mean that; for the base model ask "
            "model.fast_generate(..., lora_request=None), or inside `with model.disable_adapter():`",
        )
    return request


def _trainer_among(frame: FrameType | None, engine: RolloutEngine) -> Any:
    """The innermost object with this engine whose method runs; a trainer of TRL's, or its `VLLMGeneration`."""
    for current in _outwards(frame):
        code = current.f_code
        if not code.co_argcount:
            continue
        first = current.f_locals.get(code.co_varnames[0])
        if _is_trls(type(first)) and engine_of(first) is engine:
            return first
    return None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_trls(cls: type) -> bool:
    return any(base.__module__.startswith("trl.") for base in cls.__mro__)


def _caller(frame: FrameType) -> str:
    for current in _outwards(frame):
        if str(current.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_CALLER:
            return f"{current.f_code.co_filename}:{current.f_lineno}"
    return "a thread of its own"
