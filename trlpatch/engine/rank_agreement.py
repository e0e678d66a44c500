"""Agreement of ranks: what all ranks decide alike, because the same collectives follow from it on each.

Ranks have to agree that share an adapter (its parameters are sharded over them) or an engine (tensor parallelism under
vLLM's external_launcher: every process runs the scheduler, and the workers' collectives have to meet).
"""

from __future__ import annotations

from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.state import state_of
from trlpatch.errors import StaleAdapter
from trlpatch.policy.adapter import LoraSnapshot, LoraView
from trlpatch.policy.gathering import highest_of_all_ranks


def together(view: LoraView) -> bool:
    """Are all ranks known to be in this call?"""
    return isinstance(view, LoraSnapshot) and view.every_rank


def agreed(view: LoraView, engine: RolloutEngine, mine: bool) -> bool:
    """Is it so on any rank? `mine` where no other rank is concerned, or all are not known to be here."""
    if not together(view):
        return mine
    found = int(mine)
    if view.sharded:
        found = highest_of_all_ranks(view.weights(view.active[0]), found)
    if _spans_ranks(engine):
        found = _highest_of_engine(found)
    return bool(found)


def agreed_reason(view: LoraView, engine: RolloutEngine, reason: str | None) -> str | None:
    """Why the adapter cannot be handed over, on all ranks if on one: a push by one rank alone never ends."""
    refused = agreed(view, engine, reason is not None)
    return reason or ("another rank cannot take it; that rank's log says why" if refused else None)


def number_alike(view: LoraView, engine: RolloutEngine) -> None:
    """Make the next version of the adapter the same request, name and id, on all ranks of one engine."""
    if together(view) and _spans_ranks(engine):
        registry.continue_from(_highest_of_engine(registry.next_number()))


def wait_for_engine_ranks(view: LoraView, engine: RolloutEngine) -> None:
    """Wait until all ranks of one engine have the adapter; TRL has a barrier of its own there from 1.7.1 on."""
    if together(view) and _spans_ranks(engine):
        _highest_of_engine(0)


def seed_alike(engine: RolloutEngine) -> None:
    """Seed the ranks of one engine alike: each samples for itself, and has to come to the same tokens.

    As vLLM does when an engine is built, which is where TRL builds its own: after it has seeded each rank differently
    (`set_seed(args.seed, device_specific=True)`). An engine that was there before has to be told again.
    """
    if not _spans_ranks(engine):
        return
    import random

    import numpy
    import torch

    seed = _highest_of_engine(int(getattr(probes.model_config(engine), "seed", None) or 0))
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # every device's


def require_together(view: LoraView, model: object) -> None:
    """Check that shards may be gathered.

    Raises:
        StaleAdapter: other ranks may be elsewhere.
    """
    if not together(view):
        raise StaleAdapter(
            f"the adapter of this {type(model).__name__} is sharded over ranks ({view.sharded}) and has moved since "
            "the trainer handed it over: gathering it takes every rank, and this call may be one rank's alone; "
            "expected a call before the next optimizer step. The next rollout of the trainer hands it over"
        )


def _spans_ranks(engine: RolloutEngine) -> bool:
    """Is this process one of several that each have a worker of the engine and drive it alike?

    Asked three times a rollout; an engine is built either way.
    """
    state = state_of(engine)
    if state.spans_ranks is None:
        state.spans_ranks = (probes.tensor_parallel_size(engine) or 1) > 1 and state.backend.location == ""
    return state.spans_ranks


def _highest_of_engine(number: int) -> int:
    import torch
    from torch import distributed
    from vllm.distributed.parallel_state import get_tp_group

    value = torch.tensor([number], dtype=torch.int64)
    group: Any = get_tp_group()
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX, group=group.cpu_group)  # gloo, on every platform
    return int(value.item())
