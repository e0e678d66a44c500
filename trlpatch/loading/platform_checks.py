"""Platform checks: what the devices and the installed vLLM allow, before vLLM is imported where that matters."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from typing import Any

from packaging.version import Version

from trlpatch.engine.memory.sleep_mode import sleep_default
from trlpatch.engine.memory.sleep_mode import unsupported_reason as why_no_sleep_mode
from trlpatch.errors import ConflictingArguments, CudaRequired, EngineWithoutSleep
from trlpatch.loading.load_config import LoadConfig
from trlpatch.log import logger
from trlpatch.options import VLLM_ON_GB10, read_switch
from trlpatch.versions import installed_release

PDL_SWITCH = "TRITON_DISABLE_PDL"
PDL_HOME = "vllm.lora.ops.triton_ops"
BLACKWELL = 10
PDL_WORKS = Version("0.15")


def require_devices(config: LoadConfig) -> LoadConfig:
    """Check what needs a GPU, and settle whether there will be an engine.

    Raises CudaRequired for what cannot run here. On a DGX Spark the answer has `fast_inference=False`.
    """
    import torch

    cuda = torch.cuda.is_available()
    if config.load_in_4bit and not cuda:
        raise CudaRequired(
            "trlpatch: load_in_4bit=True (the default) needs a CUDA device, and torch finds none; set "
            "load_in_4bit=False"
        )
    if config.load_in_8bit and not cuda:
        raise CudaRequired(
            "trlpatch: load_in_8bit=True needs a CUDA device, and torch finds none; set load_in_8bit=False"
        )
    if config.load_in_fp8 and not cuda:
        raise CudaRequired(
            "trlpatch: load_in_fp8=True needs a CUDA device, and torch finds none; set load_in_fp8=False"
        )
    if cuda and config.fast_inference:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        config = _native_on_gb10(config, names)
    if cuda and config.fast_inference:
        disable_pdl([torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())])
    return config


def _native_on_gb10(config: LoadConfig, names: list[str]) -> LoadConfig:
    """vLLM is broken on DGX Spark as of January 2026: generate with transformers there."""
    if not any("GB10" in name.upper() for name in names):
        return config
    if read_switch(VLLM_ON_GB10):
        logger.warning("DGX Spark (GB10): vLLM is used because %s is set", VLLM_ON_GB10)
        return config
    if config.share_weights or config.load_in_fp8:
        flag = "share_weights=True" if config.share_weights else "load_in_fp8=True"
        raise ConflictingArguments(
            f"trlpatch: {flag} needs a vLLM engine, which is not built on DGX Spark (GB10), where vLLM is known to be "
            f"broken; leave it out, or set {VLLM_ON_GB10}=1 to use vLLM all the same"
        )
    logger.warning(
        "trlpatch: DGX Spark (GB10) found, where vLLM is known to be broken (January 2026): falling back to native "
        "inference with transformers, as fast_inference=False does. Set %s=1 to use vLLM all the same",
        VLLM_ON_GB10,
    )
    return dataclasses.replace(
        config, fast_inference=False, engine={}, without_effect=tuple(sorted(config.engine)), enable_sleep_mode=None
    )


def disable_pdl(majors: list[int]) -> None:
    """Turn programmatic dependent launch off on Blackwell (SM100) for the LoRA kernels of a vLLM below 0.15.

    TRITON_DISABLE_PDL=1 says so to whoever asks; `without_pdl` tells vLLM, which does not ask.
    """
    version = installed_release("vllm")
    if BLACKWELL in majors and version is not None and version < PDL_WORKS and PDL_SWITCH not in os.environ:
        os.environ[PDL_SWITCH] = "1"
        logger.info("trlpatch: %s=1 is set for vLLM %s on Blackwell", PDL_SWITCH, version)


def without_pdl() -> None:
    """Make the LoRA kernels of a vLLM below 0.15 launch without PDL when TRITON_DISABLE_PDL=1. Imports them."""
    version = installed_release("vllm")
    if os.environ.get(PDL_SWITCH) != "1" or version is None or version >= PDL_WORKS:
        return
    importlib.import_module(PDL_HOME)
    for name, module in list(sys.modules.items()):
        if name.startswith(PDL_HOME) and hasattr(module, "supports_pdl"):
            module.supports_pdl = _no_pdl  # type: ignore[attr-defined]


def _no_pdl(*_: Any) -> bool:
    return False


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


def engine_dtype(config: LoadConfig, hf_config: Any) -> Any:
    """The one torch dtype of engine and trainer.

    None means the checkpoint's where it is a half precision that the device computes in. A float32 checkpoint, for
    which vLLM and transformers would choose differently, becomes bfloat16 on CUDA (float16 below compute capability
    8.0) and stays float32 elsewhere.
    """
    import torch

    given = config.dtype
    if isinstance(given, str) and given != "auto":
        named = getattr(torch, given.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ConflictingArguments(f"dtype={given!r}: expected a torch dtype such as torch.bfloat16, or None")
        given = named
    cuda = torch.cuda.is_available()
    half = torch.bfloat16 if cuda and torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if given is None or given == "auto":
        of_checkpoint = _dtype_of(hf_config)
        if of_checkpoint == torch.bfloat16:
            given = half if cuda else torch.bfloat16
        elif of_checkpoint == torch.float16:
            given = torch.float16
        else:
            given = half if cuda else torch.float32
    if given not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConflictingArguments(f"dtype={given!r}: expected torch.bfloat16, torch.float16, torch.float32 or None")
    if config.fast_inference and cuda and given == torch.float32:
        raise ConflictingArguments(
            "dtype=torch.float32: vLLM's LoRA kernels on CUDA compute in 16 bits; set dtype=None, torch.bfloat16 or "
            "torch.float16, or fast_inference=False"
        )
    return given


def _dtype_of(hf_config: Any) -> Any:
    """The checkpoint's dtype: `dtype` from transformers 4.56, `torch_dtype` before, in text_config of some."""
    import torch

    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    for holder in (text, hf_config):
        for name in ("dtype", "torch_dtype"):
            found = getattr(holder, name, None)
            if isinstance(found, str):
                found = getattr(torch, found.removeprefix("torch."), None)
            if found is not None:
                return found
    return None


def sleep_mode(config: LoadConfig) -> bool:
    """Is the engine built with sleep mode? What was asked for, else TRLPATCH_SLEEP, else yes where it can be.

    Raises EngineWithoutSleep when it was asked for and cannot be had.
    """
    if config.num_engines is not None and config.enable_sleep_mode is None:
        return False  # the engines have devices of their own
    wanted = sleep_default() if config.enable_sleep_mode is None else config.enable_sleep_mode
    reason = why_no_sleep_mode() if wanted else None
    if reason is None:
        return wanted
    if config.enable_sleep_mode:
        raise EngineWithoutSleep(f"trlpatch: enable_sleep_mode=True: {reason}; or set enable_sleep_mode=False")
    logger.warning("the engine is built without sleep mode, and keeps its memory while training: %s", reason)
    return False
