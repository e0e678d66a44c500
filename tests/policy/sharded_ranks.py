"""Shard a small LoRA model over two ranks, gather its adapter, and compare with what it was: no engine, no TRL.

    RANK=0 WORLD_SIZE=2 python -m tests.policy.sharded_ranks CASE STORE OUT

Ranks meet in the file STORE, so that no port has to be free. Each writes OUT/rank<i>.json. A rank that is not done
after SECONDS writes the stacks of its threads to stderr and ends with status 1. `zero2` and `zero3` need DeepSpeed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.fakes.models import base_model, lora_model, randomize
from trlpatch.policy import gathering, lora_support
from trlpatch.policy.adapter import LoraWeights, lora_view
from trlpatch.policy.change_detection import fingerprint
from trlpatch.policy.sharding import piece_of, shape_of

CASES = ("fsdp2", "second_dimension", "replicas", "bfloat16", "one_row")
SECONDS = 240


def fsdp2(**changes: Any) -> tuple[Any, Any]:
    """Rank 3, which two ranks split into 2 + 1 rows."""
    return shard(made(**changes))


def second_dimension() -> tuple[Any, Any]:
    from torch.distributed.tensor import Shard

    return shard(made(r=4), shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))


def replicas() -> tuple[Any, Any]:
    """A mesh of two dimensions, over which half of the parameters are whole on each rank."""
    from torch.distributed.device_mesh import init_device_mesh

    return shard(made(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def bfloat16() -> tuple[Any, Any]:
    """Rows of fewer bytes than the collective aligns to."""
    return shard(made().to(torch.bfloat16))


def one_row() -> tuple[Any, Any]:
    """Rank 1: every A is empty on the second rank."""
    return shard(made(r=1))


def zero2() -> tuple[Any, Any]:
    return deepspeed_model(2)


def zero3() -> tuple[Any, Any]:
    return deepspeed_model(3)


def made(**changes: Any) -> Any:
    model = lora_model(base_model(), **{"r": 3, "lora_alpha": 6, **changes})
    randomize(model)
    return model


def shard(model: Any, **settings: Any) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    before = whole_copy(lora_view(model))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings), before


def deepspeed_model(stage: int) -> tuple[Any, Any]:
    """DeepSpeed's model; small parameters persist, as with its own default threshold."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, by all ranks at once
    model = made()
    before = whole_copy(lora_view(model))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=trained)
    return engine, before


def step(model: Any) -> None:
    """One optimizer step on data of the rank's own."""
    ids = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(distributed.get_rank()))
    loss = model(input_ids=ids, labels=ids).loss
    if hasattr(model, "backward"):
        model.backward(loss)
        model.step()
        return
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained, lr=1e-2).step()
    model.zero_grad()


def whole_copy(view: Any) -> list[Any]:
    """As torch and DeepSpeed themselves put each parameter together."""
    found = []
    for parameter in view.weights("default").parameters:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                found.append(parameter.detach().clone())
        else:
            found.append(
                (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()
            )
    return found


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of torch's collectives that are called meanwhile."""
    calls: list[str] = []
    names = ("all_gather_into_tensor", "all_gather_single", "all_gather", "all_reduce", "broadcast")
    originals = {name: getattr(distributed, name) for name in names if hasattr(distributed, name)}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(distributed, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def pieces_fit(weights: LoraWeights, whole: list[Any]) -> bool:
    """Is what `piece_of` says of each parameter a piece of the whole one?"""
    pieces = [piece_of(parameter) for parameter in weights.parameters]
    return all(
        piece is None or torch.equal(one.reshape(-1)[piece[0] :][: piece[1].numel()], piece[1])
        for one, piece in zip(whole, pieces, strict=True)
    )


def examine(case: str) -> dict[str, Any]:
    model, before = globals()[case]()
    rank, view = distributed.get_rank(), lora_view(model)
    weights = view.weights("default")
    found: dict[str, Any] = {
        "sharded": weights.sharded,
        "reason": lora_support.unsupported_reason(view),
        "rank of the adapter": weights.rank,
        "addresses": len(set(weights.addresses)) > 1,
        "pieces": pieces_fit(weights, before),
    }
    with counted() as calls:
        first = fingerprint(view)
        found["unchanged"] = fingerprint(view) == first
        found["alone"] = list(calls)
    with counted() as calls:
        together = gathering.gather(weights)
        found["gathering"] = list(calls)
    found["before"] = equal(together.parameters, before)
    step(model)
    view = lora_view(model)
    found["moved"] = fingerprint(view) != first
    again = gathering.gather(view.weights("default"))
    found["reused"] = again is together
    found["after"] = equal(again.parameters, whole_copy(view)) and not equal(again.parameters, before)
    found["shapes"] = [one.shape for one in again.parameters] == [shape_of(one) for one in weights.parameters]
    found["highest"] = gathering.highest_of_all_ranks(weights, rank)
    with torch.no_grad():
        (model(input_ids=torch.arange(8)[None]),)
    view = lora_view(model)
    found["after a forward pass"] = equal(gathering.gather(view.weights("default")).parameters, whole_copy(view))
    return found


def main(case: str, store: str, out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for one in CASES if case == "all" else (case,):
        (out / f"{one}{rank}.json").write_text(json.dumps(examine(one)))
    distributed.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a gloo group has no safe end, see tests/cpu/ranks.py
