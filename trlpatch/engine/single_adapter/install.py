"""Build an engine whose LoRA layers are the single-adapter ones, where that fits; else say why not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from trlpatch.engine.model_inspection import in_process, is_parallel
from trlpatch.engine.single_adapter.layers import layer_classes
from trlpatch.engine.single_adapter.linear import VERSION
from trlpatch.engine.single_adapter.storage import with_rows
from trlpatch.errors import ConflictingArguments
from trlpatch.log import logger

_MARKER = "trlpatch_single_adapter"
_VLLM_RANK = 16
"""vLLM's default for max_lora_rank (vllm/config/lora.py)."""


@contextlib.contextmanager
def lora_layers(arguments: Mapping[str, Any], wanted: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments to build an engine with inside the block, whose LoRA layers are those that are `wanted`.

    "vllm": vLLM's own. "auto": the single-adapter ones where they fit (`why_not`). "trlpatch": these, or an error.

    Raises:
        ConflictingArguments: "trlpatch" is wanted, and they do not fit.
    """
    if wanted == "vllm" or not arguments.get("enable_lora"):
        yield dict(arguments)
        return
    reason = why_not(arguments)
    if reason is None:
        with single_adapter_layers(arguments.get("max_lora_rank") or _VLLM_RANK):
            yield {**arguments, "additional_config": marked(arguments)}
        return
    if wanted == "trlpatch":
        raise ConflictingArguments(
            f'lora_layers="trlpatch": expected an engine with one adapter slot in this process, but {reason}; '
            'lora_layers="auto" takes vLLM\'s LoRA layers then'
        )
    logger.info("the engine has vLLM's own LoRA layers: %s", reason)
    yield dict(arguments)


def why_not(arguments: Mapping[str, Any]) -> str | None:
    """Why `vllm.LLM(**arguments)`, which has LoRA, keeps vLLM's layers for it; None if it can have these.

    Layers that do not fit (experts, embeddings, quantized ones) keep vLLM's classes in either case.
    """
    additional = arguments.get("additional_config")
    reasons = {
        "it has several adapter slots": arguments.get("max_loras", 1) != 1,
        "its model is spread over several devices": is_parallel(arguments),
        "its LoRA weights are sharded": bool(arguments.get("fully_sharded_loras")),
        "its LoRA weights have a dtype of their own": arguments.get("lora_dtype") not in (None, "auto"),
        "its adapters have biases (vLLM 0.10)": bool(arguments.get("enable_lora_bias")),
        "its additional_config is not a dictionary": not isinstance(additional or {}, dict),
        "VLLM_LORA_ENABLE_DUAL_STREAM is set": _is_set("VLLM_LORA_ENABLE_DUAL_STREAM"),
        "VLLM_BATCH_INVARIANT is set": _is_set("VLLM_BATCH_INVARIANT"),
        "its worker is in another process": not in_process(arguments),
        "this vLLM has other linear or LoRA layers": not _can_be_put_in_place(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _can_be_put_in_place() -> bool:
    try:
        from vllm.lora import utils
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        layer_classes()
    except ImportError:
        return False
    return hasattr(utils, "_all_lora_classes") and hasattr(UnquantizedLinearMethod, "create_weights")


def marked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The `additional_config` for an engine with these layers.

    vLLM keys compiled code by its configuration and by the source files that were traced. The layers replace classes
    of files that have not changed, so without a mark of its own the code of an engine with vLLM's layers would be
    loaded, and the other way round (compute_hash in vllm/config/vllm.py hashes additional_config).
    """
    return {**(arguments.get("additional_config") or {}), _MARKER: VERSION}


@contextlib.contextmanager
def single_adapter_layers(max_lora_rank: int) -> Iterator[None]:
    """Let the engine that is built inside the block have single-adapter LoRA layers wherever they fit."""
    from vllm.lora import utils

    theirs = utils._all_lora_classes
    utils._all_lora_classes = (*layer_classes(), *theirs)
    try:
        with with_rows(max_lora_rank):
            yield
    finally:
        utils._all_lora_classes = theirs


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false")
