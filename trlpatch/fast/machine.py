"""What this machine's devices and the installed vLLM allow, asked before vLLM is imported where that matters."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import sys
from typing import Any

from packaging.version import InvalidVersion, Version

from trlpatch.engine.memory.sleep_mode import sleep_default
from trlpatch.engine.memory.sleep_mode import unsupported_reason as why_no_sleep_mode
from trlpatch.errors import ConflictingArguments, CudaRequired, EngineBuildFailed, EngineWithoutSleep
from trlpatch.fast.request import Request
from trlpatch.log import logger

GB10_SWITCH = "TRLPATCH_VLLM_ON_GB10"
PDL_SWITCH = "TRITON_DISABLE_PDL"
PDL_HOME = "vllm.lora.ops.triton_ops"
BLACKWELL = 10
PDL_WORKS = Version("0.15")


def require_one_rank(asked: Request) -> None:
    """Raise EngineBuildFailed where a launcher started several ranks, each of which would build an engine.

    Built before the ranks have met, an engine of vLLM 0.23 waits for ever for a store that nobody serves; one of 0.28
    makes a process group of this rank alone, which accelerate takes for the launcher's.
    """
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if asked.fast_inference and ranks > 1:
        raise EngineBuildFailed(
            f"FastLanguageModel.from_pretrained({asked.model_name!r}): a launcher started {ranks} ranks (WORLD_SIZE), "
            "and this builds the engine of a process that is alone. Load the model with transformers and attach an "
            'engine on each rank, as docs/limits.md shows under "Several ranks", or pass fast_inference=False'
        )


def require_devices(asked: Request) -> Request:
    """Check what needs a GPU, and settle whether there will be an engine.

    Raises CudaRequired for what cannot run here. On a DGX Spark the answer has `fast_inference=False`.
    """
    import torch

    cuda = torch.cuda.is_available()
    if asked.load_in_4bit and not cuda:
        raise CudaRequired(
            "trlpatch: load_in_4bit=True (the default) needs a CUDA device, and torch finds none; set "
            "load_in_4bit=False"
        )
    if asked.load_in_fp8 and not cuda:
        raise CudaRequired(
            "trlpatch: load_in_fp8=True needs a CUDA device, and torch finds none; set load_in_fp8=False"
        )
    if cuda and asked.fast_inference:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        asked = _native_on_gb10(asked, names)
    if cuda and asked.fast_inference:
        disable_pdl([torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())])
    return asked


def _native_on_gb10(asked: Request, names: list[str]) -> Request:
    """vLLM is broken on DGX Spark as of January 2026: generate with transformers there."""
    if not any("GB10" in name.upper() for name in names):
        return asked
    if os.environ.get(GB10_SWITCH, "").lower() in ("1", "true", "on", "yes"):
        logger.warning("DGX Spark (GB10): vLLM is used because %s is set", GB10_SWITCH)
        return asked
    if asked.share_weights or asked.load_in_fp8:
        flag = "share_weights=True" if asked.share_weights else "load_in_fp8=True"
        raise ConflictingArguments(
            f"trlpatch: {flag} needs a vLLM engine, which is not built on DGX Spark (GB10), where vLLM is known to be "
            f"broken; leave it out, or set {GB10_SWITCH}=1 to use vLLM all the same"
        )
    logger.warning(
        "trlpatch: DGX Spark (GB10) found, where vLLM is known to be broken (January 2026): falling back to native "
        "inference with transformers, as fast_inference=False does. Set %s=1 to use vLLM all the same",
        GB10_SWITCH,
    )
    return dataclasses.replace(
        asked, fast_inference=False, engine={}, without_effect=tuple(sorted(asked.engine)), enable_sleep_mode=None
    )


def disable_pdl(majors: list[int]) -> None:
    """Turn programmatic dependent launch off on Blackwell (SM100) for the LoRA kernels of a vLLM below 0.15.

    TRITON_DISABLE_PDL=1 says so to whoever asks; `without_pdl` tells vLLM, which does not ask.
    """
    version = _vllm_version()
    if BLACKWELL in majors and version is not None and version < PDL_WORKS and PDL_SWITCH not in os.environ:
        os.environ[PDL_SWITCH] = "1"
        logger.info("trlpatch: %s=1 is set for vLLM %s on Blackwell", PDL_SWITCH, version)


def without_pdl() -> None:
    """Make the LoRA kernels of a vLLM below 0.15 launch without PDL when TRITON_DISABLE_PDL=1. Imports them."""
    version = _vllm_version()
    if os.environ.get(PDL_SWITCH) != "1" or version is None or version >= PDL_WORKS:
        return
    importlib.import_module(PDL_HOME)
    for name, module in list(sys.modules.items()):
        if name.startswith(PDL_HOME) and hasattr(module, "supports_pdl"):
            module.supports_pdl = _no_pdl  # type: ignore[attr-defined]


def _no_pdl(*_: Any) -> bool:
    return False


def _vllm_version() -> Version | None:
    try:
        return Version(importlib.metadata.version("vllm"))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def require_engine_platform() -> None:
    """Raise CudaRequired when the installed vLLM has no device to run on. Imports vLLM."""
    import torch
    from vllm.platforms import current_platform

    kind = getattr(current_platform, "device_type", "") or ""
    if kind in ("", "cuda") and not torch.cuda.is_available():
        raise CudaRequired(
            "trlpatch: fast_inference=True builds a vLLM engine, but torch finds no CUDA device and the installed "
            "vLLM is no build for another one; set fast_inference=False, or install vLLM's CPU build"
        )


def engine_dtype(asked: Request, config: Any) -> Any:
    """The one torch dtype of engine and trainer.

    None means the checkpoint's where it is a half precision that the device computes in. A float32 checkpoint, for
    which vLLM and transformers would choose differently, becomes bfloat16 on CUDA (float16 below compute capability
    8.0) and stays float32 elsewhere.
    """
    import torch

    given = asked.dtype
    if isinstance(given, str) and given != "auto":
        named = getattr(torch, given.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ConflictingArguments(f"dtype={given!r}: expected a torch dtype such as torch.bfloat16, or None")
        given = named
    cuda = torch.cuda.is_available()
    half = torch.bfloat16 if cuda and torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if given is None or given == "auto":
        of_checkpoint = _dtype_of(config)
        if of_checkpoint == torch.bfloat16:
            given = half if cuda else torch.bfloat16
        elif of_checkpoint == torch.float16:
            given = torch.float16
        else:
            given = half if cuda else torch.float32
    if given not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConflictingArguments(f"dtype={given!r}: expected torch.bfloat16, torch.float16, torch.float32 or None")
    if asked.fast_inference and cuda and given == torch.float32:
        raise ConflictingArguments(
            "dtype=torch.float32: vLLM's LoRA kernels on CUDA compute in 16 bits; set dtype=None, torch.bfloat16 or "
            "torch.float16, or fast_inference=False"
        )
    return given


def _dtype_of(config: Any) -> Any:
    """The checkpoint's dtype: `dtype` from transformers 4.56, `torch_dtype` before, in text_config of some."""
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (text, config):
        for name in ("dtype", "torch_dtype"):
            found = getattr(holder, name, None)
            if isinstance(found, str):
                found = getattr(torch, found.removeprefix("torch."), None)
            if found is not None:
                return found
    return None


def sleep_mode(asked: Request) -> bool:
    """Is the engine built with sleep mode? What was asked for, else TRLPATCH_SLEEP, else yes where it can be.

    Raises EngineWithoutSleep when it was asked for and cannot be had.
    """
    wanted = sleep_default() if asked.enable_sleep_mode is None else asked.enable_sleep_mode
    reason = why_no_sleep_mode() if wanted else None
    if reason is None:
        return wanted
    if asked.enable_sleep_mode:
        raise EngineWithoutSleep(f"trlpatch: enable_sleep_mode=True: {reason}; or set enable_sleep_mode=False")
    logger.warning("the engine is built without sleep mode, and keeps its memory while training: %s", reason)
    return False
