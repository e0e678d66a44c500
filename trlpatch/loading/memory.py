"""Memory requirement of a load against what the device has: arithmetic on bytes, before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trlpatch.engine.memory.device import GIB
from trlpatch.errors import NotEnoughMemory

SPARE = 0.01
"""Share of the device that the CUDA context and NCCL take between this check and vLLM's own."""


@dataclass(frozen=True)
class DeviceMemory:
    """What a device has, in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class MemoryRequirement:
    """What a load takes, in bytes.

    Attributes:
        utilization: `gpu_memory_utilization`; None when the size of the KV cache was given instead.
        weights: of the engine.
        kv_cache: given instead of a utilization.
        copy: the weights once more for transformers; 0 when they may be shared.
        why_copy: why they are not shared.
    """

    utilization: float | None
    weights: int
    kv_cache: int = 0
    copy: int = 0
    why_copy: str = ""


def require_memory(model: str, device: DeviceMemory, need: MemoryRequirement) -> None:
    """Raise NotEnoughMemory, with what was free, what is asked for and what to set, when `need` does not fit."""
    requested = need.weights + need.kv_cache if need.utilization is None else int(need.utilization * device.total)
    wish = (
        f"weights and kv_cache_memory_bytes take {gib(requested)}"
        if need.utilization is None
        else f"gpu_memory_utilization={need.utilization:g} asks for {gib(requested)} of its {gib(device.total)}"
    )
    where = f"trlpatch: loading {model} on {device.name}: {wish}"
    if need.utilization is not None and need.weights >= requested:
        raise NotEnoughMemory(
            f"{where}, but the engine's weights alone take {gib(need.weights)}, and the KV cache comes on top; "
            f"{_more(device, need)}"
        )
    if requested > device.free:
        raise NotEnoughMemory(f"{where}, and {gib(device.free)} are free; {_less(device, need)}")
    if need.copy and requested + need.copy > device.free:
        raise NotEnoughMemory(
            f"{where}, and transformers' own copy of the weights takes {gib(need.copy)} more ({need.why_copy}), but "
            f"{gib(device.free)} are free; {_less(device, need)}"
        )


def require_memory_for_copy(model: str, device: DeviceMemory, need: MemoryRequirement) -> None:
    """Raise NotEnoughMemory when the engine left too little for the copy that nobody knew would be needed."""
    if need.copy > device.free:
        used = device.total - device.free
        setting = ""
        if need.utilization is not None:
            lower = _share(device, int(need.utilization * device.total) - (need.copy - device.free))
            setting = (
                f"set gpu_memory_utilization={lower:g} or less, or " if lower * device.total > need.weights else ""
            )
        raise NotEnoughMemory(
            f"trlpatch: loading {model} on {device.name}: the weights cannot be shared ({need.why_copy}), so "
            f"transformers needs a copy of {gib(need.copy)}; with the engine, {gib(used)} of {gib(device.total)} are "
            f"in use and {gib(device.free)} free; {setting}load a smaller model"
        )


def weight_bytes(model: Any, itemsize: int, *, bits: int | None = None) -> int:
    """The bytes of a model's parameters, tied ones once; the model may be on the meta device.

    `bits` is the width of the weights of linear layers, where they are quantized: embeddings, head and norms are not.
    """
    total = 0.0
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        id(module.weight)
        for module in model.modules()
        if module is not head and type(module).__name__ == "Linear" and getattr(module, "weight", None) is not None
    }
    for parameter in model.parameters():
        quantized = bits is not None and id(parameter) in linear
        # One float32 scale per 64 weights in bitsandbytes, per row in fp8.
        total += parameter.numel() * ((bits / 8 + 1 / 16) if quantized and bits is not None else itemsize)
    return int(total)


def gib(size: float) -> str:
    """`12.3 GiB`."""
    return f"{size / GIB:.1f} GiB"


def _share(device: DeviceMemory, size: float) -> float:
    """The utilization that asks for at most `size` bytes, in hundredths."""
    return max(0.0, math.floor(100 * (size / device.total - SPARE)) / 100)


def _less(device: DeviceMemory, need: MemoryRequirement) -> str:
    smaller = "load a smaller model, or one in fewer bits, or free memory that other processes hold (nvidia-smi)"
    if need.utilization is None:
        return f"set a smaller kv_cache_memory_bytes, or {smaller}"
    share = _share(device, device.free - need.copy)
    if share * device.total <= need.weights:
        return f"the engine's weights take {gib(need.weights)} of that: {smaller}"
    return f"set gpu_memory_utilization={share:g} or less, or free memory that other processes hold (nvidia-smi)"


def _more(device: DeviceMemory, need: MemoryRequirement) -> str:
    share = math.ceil(100 * (need.weights * 1.1 + GIB) / device.total) / 100
    if share > 1 or share * device.total > device.free - need.copy:
        return f"with {gib(device.free)} free, load a smaller model or one in fewer bits"
    return f"set gpu_memory_utilization={share:g} or more"
