"""Load a model: the engine first, then the transformers model over its weights, or beside it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from trlpatch.engine import probes, sharing
from trlpatch.engine.attach import attach_engine
from trlpatch.engine.build import (
    MULTIPROCESSING,
    ProcessGroups,
    build_engine,
    environment_kept_on_failure,
    forget_frames,
    free_memory,
    lora_arguments,
    shut_down,
)
from trlpatch.engine.cudagraphs import compilation_config
from trlpatch.engine.state import state_of
from trlpatch.errors import CannotShare, ConflictingArguments, EngineMismatch, ModelNotFound
from trlpatch.export.api import attach_export
from trlpatch.loading import adapter_source, platform_checks
from trlpatch.loading.adapter import check_engine_serves, mark_fully_trained, set_gradient_checkpointing
from trlpatch.loading.checkpoint import (
    model_class,
    quantization_of,
    read_hf_config,
    reads,
    require_length,
    require_lora,
    sizes,
)
from trlpatch.loading.engine_errors import translate
from trlpatch.loading.images import load_processor, read_as_images, tokenizer_of
from trlpatch.loading.load_config import LoadConfig
from trlpatch.loading.memory import DeviceMemory, MemoryRequirement, require_memory, require_memory_for_copy
from trlpatch.loading.modes import remember_tokenizer
from trlpatch.loading.progress import Progress, memory_in_use
from trlpatch.loading.ranks import LAUNCHER, meet_other_ranks
from trlpatch.loading.tokenizer import engine_tokenizer, keep, load_tokenizer
from trlpatch.loading.transformers_backend import without_engine
from trlpatch.log import logger
from trlpatch.policy.sharding import filled_later, split_over_ranks
from trlpatch.versions import installed_version


def load(config: LoadConfig) -> tuple[Any, Any]:
    """(model, tokenizer), or (model, processor) of a model that reads images.

    Nothing is left of a load that fails or is interrupted.
    """
    show = Progress(config.model_name)
    config = meet_other_ranks(platform_checks.require_devices(config))
    groups = ProcessGroups.now()  # that of the ranks stays: accelerate knows it by now
    made: dict[str, Any] = {}
    with environment_kept_on_failure():
        before, _ = memory_in_use()
        try:
            facts = _load(config, made, show)
        except BaseException as error:
            # The frames of the exception hold tensors, some of which view the engine's memory: they go first.
            forget_frames(error)
            made.pop("model", None)
            if "engine" in made and config.num_engines is not None:
                made.pop("engine").shutdown()
            elif "engine" in made:
                shut_down(made.pop("engine"), groups)
            free_memory(groups)
            raise
    size, of_what = memory_in_use()
    show.done(max(0, size - before), of_what, facts)
    return made["model"], made["tokenizer"]


def _load(config: LoadConfig, made: dict[str, Any], show: Progress) -> list[str]:
    """Put "tokenizer", "engine" and "model" into `made` as they come; the answer is for the final line."""
    with show.stage("reading the configuration"):
        source = adapter_source.adapter_source(config)
        if source is not None:
            config = adapter_source.of_base(config, source)
        try:
            hf_config = read_hf_config(config)
        except ModelNotFound as error:
            raise error if source is None else adapter_source.base_not_found(source, error) from error
        require_length(config, hf_config)
        dtype = platform_checks.engine_dtype(config, hf_config)
        images = read_as_images(config, hf_config)
        made["tokenizer"] = load_processor(config) if images else load_tokenizer(config)
    if config.without_effect:
        logger.warning("without an engine, these have no effect: %s", ", ".join(config.without_effect))
    if not config.fast_inference:
        with show.stage("loading the weights"):
            made["model"] = without_engine(load_transformers_model(config, hf_config, dtype))
        facts = ["transformers generates (fast_inference=False)"]
    else:
        facts = _load_with_engine(config, hf_config, dtype, made, show)
    if source is not None:
        with show.stage("loading the adapter"):
            made["model"] = adapter_source.load_adapter(made["model"], source)
            check_engine_serves(made["model"], made.get("engine"))
        facts.append(f"adapter of {source.name}")
    _finish(made["model"], made["tokenizer"], config)
    attach_export(made["model"])
    return [str(dtype).removeprefix("torch."), *facts]


def _load_with_engine(
    config: LoadConfig, hf_config: Any, dtype: Any, made: dict[str, Any], show: Progress
) -> list[str]:
    with show.stage("importing vLLM"):
        need, copy = _memory_requirement(config, hf_config, dtype)
        platform_checks.require_engine_platform()
        platform_checks.without_pdl()
        if not config.full_finetuning:
            require_lora(hf_config)
        arguments = engine_arguments(config, dtype)
        arguments |= engine_tokenizer(config, hf_config, tokenizer_of(made["tokenizer"]))
        if config.images and "vision" in reads(hf_config):
            # Trainers send no videos, and the engine would measure its memory with the longest one.
            arguments.setdefault("limit_mm_per_prompt", {"video": 0})
    device = _device_memory()
    if device is not None and config.num_engines is None:
        require_memory(config.model_name, device, need)
    with show.stage("building the engine" if config.num_engines is None else f"building {config.num_engines} engines"):
        try:
            made["engine"] = _build(config, arguments)
        except Exception as error:
            raise translate(error, config) from error
    keep(tokenizer_of(made["tokenizer"]), made["engine"])
    reason = config.why_separate
    if reason is None:
        with show.stage("sharing the weights"):
            reason = _share(config, hf_config, made)
    if reason is not None:
        logger.info("the base weights of %s are not shared: %s", config.model_name, reason)
        device = _device_memory()
        if device is not None and not need.copy:
            require_memory_for_copy(config.model_name, device, dataclasses.replace(need, copy=copy, why_copy=reason))
        with show.stage("loading the weights for training"):
            made["model"] = load_transformers_model(config, hf_config, dtype)
    with show.stage("comparing engine and model"):
        whole = not filled_later() and split_over_ranks(made["model"]) is None
        if whole:
            _compare(config, made["model"], made["engine"])
        # Else the check says why it compares nothing yet, and each rank compares its part at the first rollout.
        attach_engine(made["model"], made["engine"], shared_weights=reason is None, check=not whole)
        state_of(made["engine"]).why_separate = reason
    sleeps = "with sleep mode" if probes.sleep_enabled(made["engine"]) else "without sleep mode"
    return [f"vLLM {installed_version('vllm')}", _weights_fact(config, reason), sleeps]


def _build(config: LoadConfig, arguments: dict[str, Any]) -> Any:
    if config.num_engines is None:
        return build_engine(arguments, layers=config.lora_layers)
    from trlpatch.ray.create import start_engines

    return start_engines(arguments, config.num_engines, lora_layers=config.lora_layers)


def _share(config: LoadConfig, hf_config: Any, made: dict[str, Any]) -> str | None:
    """Build the model over the engine's weights; the reason when that cannot be done."""
    try:
        made["model"] = sharing.model_over_engine(
            made["engine"], config=hf_config, trust_remote_code=config.trust_remote_code
        )
    except CannotShare as refusal:
        if config.share_weights:
            raise
        return str(refusal)
    return None


def _compare(config: LoadConfig, model: Any, engine: Any) -> None:
    """Raise EngineMismatch when model and engine differ; where the engine rounds on purpose, only say so."""
    try:
        sharing.compare_logits(model, engine)
    except EngineMismatch as mismatch:
        rounded = config.load_in_fp8 or config.load_in_8bit or config.float8_kv_cache
        if not (rounded or config.engine.get("quantization")):
            raise
        logger.warning("the quantization of engine or model shows: %s", mismatch)


def engine_arguments(config: LoadConfig, dtype: Any) -> dict[str, Any]:
    """The arguments of `vllm.LLM`; what the user gave as such comes last and wins. Imports vLLM."""
    try:
        lora = lora_arguments(config.max_lora_rank)
    except ValueError as error:
        raise ConflictingArguments(f"trlpatch: {error}; set a smaller max_lora_rank") from error
    if config.full_finetuning:  # no request will name an adapter: no buffers, no LoRA kernels
        lora = {name: value for name, value in lora.items() if "lora" not in name}
    arguments: dict[str, Any] = {
        "model": config.model_name,
        "max_model_len": config.max_seq_length,
        "dtype": str(dtype).removeprefix("torch."),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "disable_log_stats": config.disable_log_stats,
        "trust_remote_code": config.trust_remote_code,
        "enable_sleep_mode": platform_checks.sleep_mode(config),
        **lora,
    }
    if config.revision is not None:
        arguments["revision"] = config.revision
        if config.tokenizer_name is None:
            arguments["tokenizer_revision"] = config.revision
    if config.token is not None:
        arguments["hf_token"] = config.token
    if "cache_dir" in config.model:
        arguments["download_dir"] = str(config.model["cache_dir"])
    if config.load_in_4bit:
        arguments["quantization"] = "bitsandbytes"
    if config.load_in_fp8:
        arguments["quantization"] = "fp8"
    if config.float8_kv_cache:
        arguments["kv_cache_dtype"] = "fp8"
    if config.tokenizer_name is not None:
        arguments["tokenizer"] = config.tokenizer_name
    if config.random_state is not None:
        arguments["seed"] = config.random_state
    arguments |= config.engine
    if graphs := compilation_config(arguments):
        arguments["compilation_config"] = graphs
    # TRL's own engines have this (grpo_trainer.py, 0.20 and newer); vLLM's default is 16384 on a large device, whose
    # activations cost a gibibyte at 7B.
    arguments.setdefault("max_num_batched_tokens", max(4096, config.max_seq_length))
    if arguments["enable_sleep_mode"] and not _in_process(arguments):
        arguments.setdefault("worker_extension_cls", "trlpatch.engine.worker_extension.KvCacheSleep")
    return arguments


def _in_process(arguments: dict[str, Any]) -> bool:
    """Will the engine's workers live in this process?"""
    alone = arguments.get("tensor_parallel_size", 1) == 1
    launched = arguments.get("distributed_executor_backend") == LAUNCHER
    return (alone or launched) and os.environ.get(MULTIPROCESSING, "0") == "0"


def load_transformers_model(config: LoadConfig, hf_config: Any, dtype: Any) -> Any:
    """The model with weights of its own, on the device that the engine uses.

    Where they are sharded later, whoever shards them puts them there; ZeRO-3 takes no `device_map` at all.
    """
    import torch
    import transformers
    from packaging.version import Version

    arguments: dict[str, Any] = {**config.hub, **config.model, "config": hf_config}
    # transformers 4.56 renamed it.
    arguments["dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"] = dtype
    if config.revision is None:
        del arguments["revision"]
    if torch.cuda.is_available() and config.why_ranks_separate is None:
        arguments.setdefault("device_map", {"": torch.cuda.current_device()})
    if config.load_in_4bit and quantization_of(hf_config) is None:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    if config.load_in_8bit and quantization_of(hf_config) is None:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = model_class(config, hf_config).from_pretrained(config.model_name, **arguments)
    if config.resize_model_vocab is not None:
        model.resize_token_embeddings(config.resize_model_vocab)
    if config.full_finetuning:
        mark_fully_trained(model.requires_grad_(True))
    return model.eval()


def _finish(model: Any, processing: Any, config: LoadConfig) -> None:
    tokenizer = tokenizer_of(processing)
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None and getattr(settings, "pad_token_id", None) is None:
            settings.pad_token_id = tokenizer.pad_token_id
    remember_tokenizer(model, tokenizer)
    if config.use_gradient_checkpointing:
        set_gradient_checkpointing(model, on=True, auto=config.use_gradient_checkpointing == "auto")


def _memory_requirement(config: LoadConfig, hf_config: Any, dtype: Any) -> tuple[MemoryRequirement, int]:
    """(what the load takes as far as `config` says, the bytes of a copy of the weights for transformers)."""
    of_engine, of_trainer = sizes(config, hf_config, dtype)
    kv_cache = config.engine.get("kv_cache_memory_bytes")
    need = MemoryRequirement(
        utilization=None if kv_cache else config.gpu_memory_utilization,
        weights=of_engine,
        kv_cache=int(kv_cache or 0),
        copy=of_trainer if config.why_separate else 0,
        why_copy=config.why_separate or "",
    )
    return need, of_trainer


def _device_memory() -> DeviceMemory | None:
    """The current CUDA device; None where there is none, and vLLM's own check counts."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    index = torch.cuda.current_device()
    return DeviceMemory(f"cuda:{index} ({torch.cuda.get_device_name(index)})", int(free), int(total))


def _weights_fact(config: LoadConfig, reason: str | None) -> str:
    if reason is None:
        return "base weights shared"
    return f"base weights separate ({config.why_separate or 'trlpatch.status() says why'})"
