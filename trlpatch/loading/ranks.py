"""Several ranks (torchrun, accelerate launch): they meet before any of them builds its engine.

Built before, an engine of vLLM 0.23 waits for ever for a store that nobody serves; one of 0.28 makes a process group
of its rank alone, which accelerate takes for the launcher's.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from trlpatch.errors import ConflictingArguments, EngineBuildFailed
from trlpatch.loading.load_config import LoadConfig
from trlpatch.options import read_launcher

LAUNCHER = "external_launcher"
"""vLLM's executor for an engine whose rank, and whose other ranks if it has some, somebody else has started."""


def meet_other_ranks(config: LoadConfig) -> LoadConfig:
    """Make the process group of the launcher's ranks, as a trainer's config would, and give each rank its own engine.

    The answer's engine arguments are of this rank: vLLM's executor for ranks of a launcher, and a seed of its own, or
    all ranks sample the same completions of the same prompts. Ranks that share an engine (`tensor_parallel_size`)
    share the seed: they have to sample alike. Nothing changes without a launcher, and without an engine.

    Raises:
        EngineBuildFailed: not all ranks met.
        ConflictingArguments: they cannot be divided among engines of this size; or `share_weights=True` where the
            launcher shards the trainer's weights.
        InvalidOption: WORLD_SIZE is no number.
    """
    world = read_launcher("WORLD_SIZE", 1)
    if not config.fast_inference or world < 2:
        return config
    size = int(config.engine.get("tensor_parallel_size") or 1)
    if world % size:
        raise ConflictingArguments(
            f"tensor_parallel_size={size}: a launcher started {world} ranks (WORLD_SIZE), which cannot be divided "
            f"among engines of {size}; set tensor_parallel_size to a divisor of {world}"
        )
    shards = sharding_launcher()
    if shards is not None and config.share_weights:
        raise ConflictingArguments(
            f"share_weights=True, but {shards}, and the engine needs them whole; leave share_weights out"
        )
    rank = _rank_among(world, config)
    if config.share_weights is None and _on_a_cpu():
        shards = shards or "the trainer moves a rank's model from cpu to cpu:0, which is a copy for torch"
    seed = int(config.engine.get("seed") or config.random_state or 0)
    engine = {"distributed_executor_backend": LAUNCHER, **config.engine, "seed": seed + rank // size}
    return dataclasses.replace(config, engine=engine, why_ranks_separate=shards)


def _on_a_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _rank_among(world: int, config: LoadConfig) -> int:
    from accelerate import PartialState

    # One that the user or a trainer's config has made knows its backend.
    state: Any = PartialState() if PartialState._shared_state else PartialState(cpu=_on_a_cpu())
    if state.num_processes != world:
        raise EngineBuildFailed(
            f"FastLanguageModel.from_pretrained({config.model_name!r}): a launcher started {world} ranks "
            f"(WORLD_SIZE), but the process group has {state.num_processes}; expected RANK, LOCAL_RANK, MASTER_ADDR "
            "and MASTER_PORT as torchrun and accelerate launch set them, and no engine built before; unset WORLD_SIZE "
            "for one process"
        )
    return int(state.process_index)


def sharding_launcher() -> str | None:
    """How `accelerate launch` was told to treat the trainer's weights, if so that they cannot be an engine's, too."""
    if _on("ACCELERATE_USE_FSDP"):
        return "FSDP (ACCELERATE_USE_FSDP) splits the trainer's weights over the ranks"
    if _on("ACCELERATE_USE_DEEPSPEED") and _zero_stage() >= 3:
        return "DeepSpeed ZeRO-3 splits the trainer's weights over the ranks"
    return None


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _zero_stage() -> int:
    """The stage of accelerate's own questionnaire, or of the DeepSpeed configuration that it names."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path in ("", "none"):
        return read_launcher("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0)
    try:
        stage = json.loads(Path(path).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):  # base64, or one that DeepSpeed will refuse
        return 3
    return int(stage)
