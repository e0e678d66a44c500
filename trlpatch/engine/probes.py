"""Capability probes: what this vLLM engine can do, asked of the engine itself rather than of its version number."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from trlpatch.engine.protocols import Executor, LoraManager, RolloutEngine, WeightsMapper

if TYPE_CHECKING:
    from torch.nn import Module

T = TypeVar("T")

_FULL_CACHE = ("auto", "float16", "bfloat16", "float32", "half", "float")

WEIGHTS, KV_CACHE = "weights", "kv_cache"
SLEEP_TAGS = frozenset({WEIGHTS, KV_CACHE})

# vllm/config.py up to 0.11.0, which has the list inside a function; later releases publish it as
# MaxLoRARanks.
_RANKS_WITHOUT_LITERAL = (8, 16, 32, 64, 128, 256, 320, 512)

PAUSED = (
    "paused by sleep(), which freed no memory, because it was built without enable_sleep_mode=True; llm.wake_up() "
    "ends that"
)
"""What an engine is that cannot sleep and that vLLM counts as asleep."""


def reach(root: object, *names: str) -> Any:
    """`root.a.b.c`, or None as soon as one of the names is missing or None."""
    found: Any = root
    for name in names:
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def looks_like_engine(llm: object) -> TypeGuard[RolloutEngine]:
    """True for `vllm.LLM` and anything with the same surface (`generate`, and an `llm_engine` behind it)."""
    return callable(getattr(llm, "generate", None)) and getattr(llm, "llm_engine", None) is not None


def model_config(llm: object) -> Any:
    """The engine's ModelConfig, under `vllm_config` or, on older vLLM, beside it."""
    found = reach(llm, "llm_engine", "vllm_config", "model_config")
    return found if found is not None else reach(llm, "llm_engine", "model_config")


def lora_config(llm: object) -> Any:
    """The engine's LoRAConfig, None when it was built without LoRA."""
    return reach(llm, "llm_engine", "vllm_config", "lora_config")


def sleep_enabled(llm: object) -> bool:
    """Was it built with `enable_sleep_mode=True`? Without it `sleep()` pauses vLLM's V1 engine and unmaps nothing."""
    return bool(getattr(model_config(llm), "enable_sleep_mode", False))


def lora_enabled(llm: object) -> bool:
    """Was it built with `enable_lora=True`?"""
    return lora_config(llm) is not None


def tower_lora_enabled(llm: object) -> bool:
    """Was it built with `enable_tower_connector_lora=True`? Without, it adapts a language model only."""
    return bool(getattr(lora_config(llm), "enable_tower_connector_lora", False))


def max_lora_rank(llm: object) -> int:
    """The rank its LoRA buffers are built for; 0 when it was built without LoRA."""
    return int(getattr(lora_config(llm), "max_lora_rank", 0) or 0)


def tensor_parallel_size(llm: object) -> int | None:
    """The number of ranks that share one copy of the engine's weights; None when it does not say."""
    size = reach(llm, "llm_engine", "vllm_config", "parallel_config", "tensor_parallel_size")
    return None if size is None else int(size)


def logprobs_mode(llm: object) -> str | None:
    """As vLLM spells it, "raw_logprobs" for one; None below vLLM 0.10.0, which has raw ones only."""
    mode = getattr(model_config(llm), "logprobs_mode", None)
    return None if mode is None else str(getattr(mode, "value", mode))


def max_model_len(llm: object) -> int | None:
    """Prompt and completion together, in tokens."""
    length = getattr(model_config(llm), "max_model_len", None)
    return None if length is None else int(length)


def vocabulary_size(llm: object) -> int | None:
    """Rows of its embedding, padding left out; None when it does not say."""
    asked = getattr(model_config(llm), "get_vocab_size", None)
    return int(asked()) or None if callable(asked) else None


def kv_block_size(llm: object) -> int | None:
    """Tokens of one block of its KV cache, the least that its prefix cache keeps; None when it does not say."""
    size = reach(llm, "llm_engine", "vllm_config", "cache_config", "block_size")
    return None if size is None else int(size)


def quantization(llm: object) -> str | None:
    """What it rounds weights or KV cache to, in words; None when it computes with what the checkpoint has."""
    config = reach(llm, "llm_engine", "vllm_config")
    weights = getattr(model_config(llm), "quantization", None) or reach(config, "quant_config")
    if weights is not None:
        return f"weights: {weights if isinstance(weights, str) else type(weights).__name__}"
    cache = str(reach(config, "cache_config", "cache_dtype") or "auto")
    return None if cache in _FULL_CACHE else f"KV cache: {cache}"


def built_with(llm: object) -> dict[str, object]:
    """What the engine was built with, by the names of `vllm.LLM`'s arguments, as far as it says."""
    config = reach(llm, "llm_engine", "vllm_config")
    found = {
        "max_model_len": max_model_len(llm),
        "model_impl": getattr(model_config(llm), "model_impl", None),
        "gpu_memory_utilization": reach(config, "cache_config", "gpu_memory_utilization"),
        "enable_prefix_caching": reach(config, "cache_config", "enable_prefix_caching"),
    }
    return {name: getattr(value, "value", value) for name, value in found.items() if value is not None}


def executor(llm: object) -> Executor | None:
    """The engine's executor when it lives in this process (multiprocessing off), else None."""
    found: Executor | None = reach(llm, "llm_engine", "model_executor")
    return found


def engine_core(llm: object) -> Any:
    """The EngineCore when it lives in this process (`InprocClient.engine_core`), else None."""
    return reach(llm, "llm_engine", "engine_core", "engine_core")


def worker_lora_manager(llm: object) -> LoraManager | None:
    """The worker's LoRA manager when the worker lives in this process and has one, else None."""
    worker = reach(executor(llm), "driver_worker")
    if worker is None:
        return None
    # WorkerWrapperBase forwards attributes to the worker it wraps.
    manager: LoraManager | None = reach(worker, "model_runner", "lora_manager")
    return manager if getattr(manager, "_adapter_manager", None) is not None else None


def engine_module(llm: object) -> Module | None:
    """The torch module that the worker runs, when it lives in this process, else None.

    Asked with `get_model()`: with CUDA graphs `model_runner.model` is a wrapper.
    """
    runner = reach(executor(llm), "driver_worker", "model_runner")
    get_model = getattr(runner, "get_model", None)
    return get_model() if callable(get_model) else getattr(runner, "model", None)


def legal_ranks() -> tuple[int, ...]:
    """The values vLLM accepts for `max_lora_rank`, ascending; read from vLLM's own type where it has one."""
    try:
        from vllm.config.lora import MaxLoRARanks
    except ImportError:
        return _RANKS_WITHOUT_LITERAL
    return tuple(sorted(int(rank) for rank in typing.get_args(MaxLoRARanks))) or _RANKS_WITHOUT_LITERAL


def legal_rank(rank: int) -> int | None:
    """The smallest legal `max_lora_rank` that holds `rank`, or None when vLLM has none that large."""
    return next((legal for legal in legal_ranks() if legal >= rank), None)


def accepted(function: Callable[..., object], arguments: Mapping[str, T]) -> dict[str, T]:
    """Those of `arguments` that `function` has a parameter for: vLLM's releases differ."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def rename_mapper(module: Module) -> WeightsMapper | None:
    """vLLM's mapper from checkpoint names to its own, without the fusion of q/k/v and gate/up; None when it has none.

    Up to 0.24 the mapper only renames; 0.25 gave it fusion and `get_unstacked_mapper`, 0.29 `get_rename_mapper`.
    """
    mapper: WeightsMapper | None = getattr(module, "hf_to_vllm_mapper", None)
    for unfused in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, unfused):
            mapper = getattr(mapper, unfused)()
            break
    return mapper
