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
from trlpatch.engine.state import state_of
from trlpatch.errors import CannotShare, ConflictingArguments, EngineMismatch
from trlpatch.fast import machine
from trlpatch.fast.adapter import set_gradient_checkpointing
from trlpatch.fast.advice import explained
from trlpatch.fast.checkpoint import quantization_of, read_config, require_lora, sizes
from trlpatch.fast.memory import Need, Room, require_room, require_room_for_copy
from trlpatch.fast.native import without_engine
from trlpatch.fast.progress import Progress, memory_in_use
from trlpatch.fast.request import Request
from trlpatch.log import logger


def load(asked: Request) -> tuple[Any, Any]:
    """(model, tokenizer).

    Nothing is left of a load that fails or is interrupted.
    """
    show = Progress(asked.model_name)
    groups = ProcessGroups.now()
    made: dict[str, Any] = {}
    with environment_kept_on_failure():
        before, _ = memory_in_use()
        try:
            facts = _load(asked, made, show)
        except BaseException as error:
            # The frames of the exception hold tensors, some of which view the engine's memory: they go first.
            forget_frames(error)
            made.pop("model", None)
            if "engine" in made:
                shut_down(made.pop("engine"), groups)
            free_memory(groups)
            raise
    size, of_what = memory_in_use()
    show.done(max(0, size - before), of_what, facts)
    return made["model"], made["tokenizer"]


def _load(asked: Request, made: dict[str, Any], show: Progress) -> list[str]:
    """Put "tokenizer", "engine" and "model" into `made` as they come; the answer is for the final line."""
    with show.stage("reading the configuration"):
        asked = machine.require_devices(asked)
        machine.require_one_rank(asked)
        config = read_config(asked)
        dtype = machine.engine_dtype(asked, config)
        made["tokenizer"] = load_tokenizer(asked)
    if asked.without_effect:
        logger.warning("without an engine, these have no effect: %s", ", ".join(asked.without_effect))
    if not asked.fast_inference:
        with show.stage("loading the weights"):
            made["model"] = without_engine(load_transformers_model(asked, config, dtype))
        facts = ["transformers generates (fast_inference=False)"]
    else:
        facts = _load_with_engine(asked, config, dtype, made, show)
    _finish(made["model"], made["tokenizer"], asked)
    return [str(dtype).removeprefix("torch."), *facts]


def _load_with_engine(asked: Request, config: Any, dtype: Any, made: dict[str, Any], show: Progress) -> list[str]:
    with show.stage("importing vLLM"):
        need, copy = _need(asked, config, dtype)
        machine.require_engine_platform()
        machine.without_pdl()
        require_lora(config)
        arguments = engine_arguments(asked, dtype)
    room = _room()
    if room is not None:
        require_room(asked.model_name, room, need)
    with show.stage("building the engine"):
        try:
            made["engine"] = build_engine(arguments)
        except Exception as error:
            raise explained(error, asked) from error
    reason = asked.why_separate
    if reason is None:
        with show.stage("sharing the weights"):
            reason = _share(asked, config, made)
    if reason is not None:
        logger.info("the base weights of %s are not shared: %s", asked.model_name, reason)
        room = _room()
        if room is not None and not need.copy:
            require_room_for_copy(asked.model_name, room, dataclasses.replace(need, copy=copy, why_copy=reason))
        with show.stage("loading the weights for training"):
            made["model"] = load_transformers_model(asked, config, dtype)
    with show.stage("comparing engine and model"):
        _compare(asked, made["model"], made["engine"])
        attach_engine(made["model"], made["engine"], shared_weights=reason is None)
        state_of(made["engine"]).why_separate = reason
    sleeps = "with sleep mode" if probes.sleep_enabled(made["engine"]) else "without sleep mode"
    return [_engine_fact(), _weights_fact(asked, reason), sleeps]


def _share(asked: Request, config: Any, made: dict[str, Any]) -> str | None:
    """Build the model over the engine's weights; the reason when that cannot be done."""
    try:
        made["model"] = sharing.model_over_engine(
            made["engine"], config=config, trust_remote_code=asked.trust_remote_code
        )
    except CannotShare as refusal:
        if asked.share_weights:
            raise
        return str(refusal)
    return None


def _compare(asked: Request, model: Any, engine: Any) -> None:
    """Raise EngineMismatch when model and engine differ; where the engine rounds on purpose, only say so."""
    try:
        sharing.compare_logits(model, engine)
    except EngineMismatch as mismatch:
        if not (asked.load_in_fp8 or asked.float8_kv_cache or asked.engine.get("quantization")):
            raise
        logger.warning("the engine's quantization shows: %s", mismatch)


def engine_arguments(asked: Request, dtype: Any) -> dict[str, Any]:
    """The arguments of `vllm.LLM`; what the user gave as such comes last and wins. Imports vLLM."""
    try:
        lora = lora_arguments(asked.max_lora_rank)
    except ValueError as error:
        raise ConflictingArguments(f"trlpatch: {error}; set a smaller max_lora_rank") from error
    arguments: dict[str, Any] = {
        "model": asked.model_name,
        "max_model_len": asked.max_seq_length,
        "dtype": str(dtype).removeprefix("torch."),
        "gpu_memory_utilization": asked.gpu_memory_utilization,
        "disable_log_stats": asked.disable_log_stats,
        "trust_remote_code": asked.trust_remote_code,
        "enable_sleep_mode": machine.sleep_mode(asked),
        **lora,
    }
    if asked.revision is not None:
        arguments |= {"revision": asked.revision, "tokenizer_revision": asked.revision}
    if asked.token is not None:
        arguments["hf_token"] = asked.token
    if "cache_dir" in asked.model:
        arguments["download_dir"] = str(asked.model["cache_dir"])
    if asked.load_in_4bit:
        arguments["quantization"] = "bitsandbytes"
    if asked.load_in_fp8:
        arguments["quantization"] = "fp8"
    if asked.float8_kv_cache:
        arguments["kv_cache_dtype"] = "fp8"
    arguments |= asked.engine
    if arguments["enable_sleep_mode"] and not _in_process(arguments):
        arguments.setdefault("worker_extension_cls", "trlpatch.engine.worker_extension.KvCacheSleep")
    return arguments


def _in_process(arguments: dict[str, Any]) -> bool:
    """Will the engine's workers live in this process?"""
    return arguments.get("tensor_parallel_size", 1) == 1 and os.environ.get(MULTIPROCESSING, "0") == "0"


def load_tokenizer(asked: Request) -> Any:
    """The tokenizer as TRL's trainers want it: padding on the left, and a token to pad with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.model_name, **asked.of_tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_transformers_model(asked: Request, config: Any, dtype: Any) -> Any:
    """The model with weights of its own, on the device that the engine uses."""
    import torch
    import transformers
    from packaging.version import Version

    arguments: dict[str, Any] = {**asked.hub, **asked.model, "config": config}
    # transformers 4.56 renamed it.
    arguments["dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"] = dtype
    if asked.revision is None:
        del arguments["revision"]
    if torch.cuda.is_available():
        arguments.setdefault("device_map", {"": torch.cuda.current_device()})
    if asked.load_in_4bit and quantization_of(config) is None:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model_name, **arguments)
    return model.eval()


def _finish(model: Any, tokenizer: Any, asked: Request) -> None:
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None and getattr(settings, "pad_token_id", None) is None:
            settings.pad_token_id = tokenizer.pad_token_id
    if asked.use_gradient_checkpointing:
        set_gradient_checkpointing(model, on=True)


def _need(asked: Request, config: Any, dtype: Any) -> tuple[Need, int]:
    """(what the request takes as far as it says, the bytes of a copy of the weights for transformers)."""
    of_engine, of_trainer = sizes(asked, config, dtype)
    kv_cache = asked.engine.get("kv_cache_memory_bytes")
    need = Need(
        utilization=None if kv_cache else asked.gpu_memory_utilization,
        weights=of_engine,
        kv_cache=int(kv_cache or 0),
        copy=of_trainer if asked.why_separate else 0,
        why_copy=asked.why_separate or "",
    )
    return need, of_trainer


def _room() -> Room | None:
    """The current CUDA device; None where there is none, and vLLM's own check counts."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    index = torch.cuda.current_device()
    return Room(f"cuda:{index} ({torch.cuda.get_device_name(index)})", int(free), int(total))


def _weights_fact(asked: Request, reason: str | None) -> str:
    if reason is None:
        return "base weights shared"
    return f"base weights separate ({asked.why_separate or 'trlpatch.status() says why'})"


def _engine_fact() -> str:
    import importlib.metadata

    return f"vLLM {importlib.metadata.version('vllm')}"
