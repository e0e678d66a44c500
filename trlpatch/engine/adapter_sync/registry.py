"""Adapter manager: vLLM's registry of adapters, requests that refer to it, and the objects in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync import missing_layers
from trlpatch.engine.adapter_sync.shape_check import misfit
from trlpatch.engine.protocols import LoraManager, LoraModel, LoraRequest, RolloutEngine
from trlpatch.errors import AdapterNotExpressible, EngineMismatch, StaleAdapter
from trlpatch.policy.adapter import LoraWeights

if TYPE_CHECKING:
    from torch import Tensor

# Far above what people number their own adapters with, far below 2**31 (vLLM keeps ids in int32 tensors).
LIVE_ID = 1_700_000_000
LIVE_NAME = "trlpatch-v"
"""What the names of all versions of the live adapter begin with."""
# A request whose id is registered never makes vLLM look at its path (`LRUCacheWorkerLoRAManager.add_adapter`,
# 0.8.0 to 0.33.0). Should vLLM ever drop the adapter, loading this one fails at once and without asking the hub.
NOWHERE = Path("/nonexistent/trlpatch")

# One count per process, not per engine: a name must not come back when an engine is detached and attached again.
_versions = itertools.count(1)


def next_number() -> int:
    """Take the next number of a version; nobody else gets it."""
    return next(_versions)


def continue_from(number: int) -> None:
    """Number versions from here on, which must not be lower than those given."""
    global _versions
    _versions = itertools.count(number)


def fresh_request(directory: Path, *, lora_id: int | None = None) -> LoraRequest:
    """Make a request whose name and path (below `directory`) no earlier version had, nor its id unless it is given."""
    from vllm.lora.request import LoRARequest

    number = next_number()
    name = f"{LIVE_NAME}{number}"
    number = LIVE_ID + number if lora_id is None else lora_id
    request: LoraRequest = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(directory / name))
    return request


@cache
def names_separate_prefixes() -> bool:
    """Does a new name alone keep vLLM from reusing cached prefixes of the version before?

    The key of a cached block holds the adapter's id up to 0.11.0, its name from 0.11.2 and name and path from 0.31;
    never its weights (vllm#42125). Asked of the function that makes the key.
    """
    try:
        from vllm.lora.request import LoRARequest
        from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys as keys

        one, other = (
            keys(SimpleNamespace(lora_request=LoRARequest(lora_name=name, lora_int_id=1, lora_path=f"/{name}")))
            for name in ("one", "other")
        )
    except (ImportError, AttributeError, TypeError):
        return False
    return bool(one != other)


def worker_of(engine: RolloutEngine | None) -> LoraManager:
    """The worker's LoRA manager, of an engine that had one in this process.

    Raises:
        StaleAdapter: the engine was deleted or shut down.
    """
    worker = probes.worker_lora_manager(engine)
    if worker is None:
        raise StaleAdapter(
            "handing the adapter over: the engine's worker is no longer in this process; expected the engine "
            "that was attached to be alive; build a new one and call trlpatch.attach_engine(model, llm)"
        )
    return worker


def lora_model(worker: LoraManager, tensors: Mapping[str, Tensor], weights: LoraWeights, lora_id: int) -> LoraModel:
    """vLLM's object of an adapter, not registered yet, made of `tensors` (PEFT's names, B scaled already).

    Tensors of the engine's LoRA dtype are used as they are, not copied.

    Raises:
        AdapterNotExpressible: the engine has no place for one of the modules.
        EngineMismatch: its place has another shape.
    """
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker._adapter_manager
    helper = PEFTHelper.from_dict(
        {"r": weights.rank, "lora_alpha": weights.rank, "target_modules": list(weights.targets)}
    )
    helper.validate_legal(worker.lora_config)
    build = _lora_model_class(worker).from_lora_tensors
    optional = {
        "device": None,  # keep each tensor where it is
        "dtype": worker.lora_config.lora_dtype,
        "weights_mapper": probes.rename_mapper(manager.model),
        "skip_prefixes": getattr(manager.model, "lora_skip_prefixes", None),
        # Asserted up to 0.11.2, although used for embeddings only.
        "embedding_modules": getattr(worker, "embedding_modules", {}),
        "embedding_padding_modules": getattr(worker, "embedding_padding_modules", []),
    }
    lora: LoraModel = build(
        lora_model_id=lora_id, tensors=dict(tensors), peft_helper=helper, **probes.accepted(build, optional)
    )
    # vLLM's own loader refuses modules it does not know; this entrance would drop them without a word.
    known = set(manager.modules).union(*manager.packed_modules.values())
    unknown = sorted(set(lora.loras) - known)
    if unknown:
        raise AdapterNotExpressible(missing_layers.in_words(manager.model, unknown, weights.paths))
    wrong = misfit(manager, ((name, entry.input_dim, entry.output_dim) for name, entry in lora.loras.items()))
    if wrong is not None:
        raise EngineMismatch(
            f"handing the adapter over: {wrong}; expected the engine of the model that is trained: attach one that "
            "was built from the same checkpoint, trlpatch.attach_engine(model, llm)"
        )
    return lora


def register(worker: LoraManager, lora: LoraModel) -> None:
    """Put the adapter into the registry and into a slot; an older one with its id goes."""
    manager = worker._adapter_manager
    manager.remove_adapter(lora.id)
    # Make room as vLLM's own loader does: capacity is max_cpu_loras, which defaults to max_loras.
    if len(manager) + 1 > manager.capacity and hasattr(manager, "remove_oldest_adapter"):
        manager.remove_oldest_adapter()
    manager.add_adapter(lora)
    activate(worker, lora.id)


def activate(worker: LoraManager, lora_id: int) -> None:
    """Put a registered adapter into a slot.

    vLLM below 0.26 tells its kernels the slots only when the ids of a batch differ from the last batch's, so after a
    change of slots behind its back, or a level-2 sleep, it has to forget that batch.
    """
    manager = worker._adapter_manager
    manager.activate_adapter(lora_id)
    manager._last_mapping = None


def _lora_model_class(worker: LoraManager) -> Any:
    found = getattr(worker, "_lora_model_cls", None)
    if found is not None:
        return found
    try:
        from vllm.lora.lora_model import LoRAModel  # 0.13.0 and newer
    except ImportError:
        from vllm.lora.models import LoRAModel
    return LoRAModel
