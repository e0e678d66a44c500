"""Restore the rank in the environment, where TRL wrote it for an engine that it does not build after all.

Before `LLM(...)` TRL 0.20 and newer sets RANK, LOCAL_RANK and WORLD_SIZE, which vLLM wants from a launcher. accelerate
takes them for a launcher's, too: the next trainer of the process would be wrapped in DistributedDataParallel, where
reentrant gradient checkpointing (the default of transformers 4) fails with "mark a variable ready only once".
"""

from __future__ import annotations

import os
import sys
from typing import Any

from trlpatch.errors import EngineMismatch, SharedWeights
from trlpatch.options import read_launcher

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_before: dict[str, str | None] = {}


def remember() -> None:
    """Note the environment; called at the head of a trainer's `__init__`."""
    _before.update({name: os.environ.get(name) for name in _NAMES})


def restore() -> None:
    """Put back what was noted last, if it was not put back before."""
    while _before:
        name, value = _before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def require_process_group(trainer: object) -> None:
    """Check that torch.distributed knows of all ranks that a launcher started.

    vLLM makes a process group of one rank for an engine that is built before there is any, and accelerate takes it
    for the launcher's: every rank would train alone, on the same data, without a word.

    Raises:
        EngineMismatch: it knows of this one alone.
        InvalidOption: WORLD_SIZE is no number.
    """
    asked = read_launcher("WORLD_SIZE", 1)
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if asked < 2 or distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    found = distributed.get_world_size()
    if found == 1:
        raise EngineMismatch(
            f"{type(trainer).__name__}: a launcher started {asked} ranks, but the attached engine was built before "
            "they met and vLLM made a process group of one: each rank would train alone. Build the trainer's "
            "config, or call accelerate.PartialState(), before the engine: "
            'vllm.LLM(..., distributed_executor_backend="external_launcher")'
        )


def require_unsharded_arguments(trainer: object, args: Any) -> None:
    """Check that the trainer will leave base weights whole that are the engine's own memory.

    Raises:
        SharedWeights: FSDP or DeepSpeed ZeRO-3 would split and move them.
    """
    zero3 = getattr(getattr(args, "hf_deepspeed_config", None), "is_zero3", None)
    if getattr(args, "fsdp", None):
        who = f"fsdp={args.fsdp!r}"
    elif callable(zero3) and zero3():
        who = "DeepSpeed ZeRO-3"
    else:
        return
    raise SharedWeights(
        f"{type(trainer).__name__}: {who} would split base weights over the ranks that are the engine's own memory; "
        "expected weights of the trainer's own: FastLanguageModel.from_pretrained(..., share_weights=False)"
    )
