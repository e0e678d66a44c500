"""Measure and free device memory, as the driver and torch see it. Everything here does nothing without CUDA."""

from __future__ import annotations

import gc
import sys
from typing import Any

GIB = 2**30


def _torch() -> Any:
    """Torch if this process computes on CUDA already, else None."""
    torch = sys.modules.get("torch")
    # First what is a flag: `is_available` reads the environment and asks the driver, before every rollout.
    return torch if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_available() else None


def synchronize() -> None:
    """Wait for every kernel: unmapping memory that one still reads is an illegal access."""
    torch = _torch()
    if torch is not None:
        torch.cuda.synchronize()


def capability() -> tuple[int, int]:
    """Compute capability of the current CUDA device, (9, 0) for Hopper; (0, 0) without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0, 0
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def free_bytes(device: int | None = None) -> int | None:
    """What the driver could still hand out, in bytes; None without CUDA."""
    torch = _torch()
    return None if torch is None else int(torch.cuda.mem_get_info(device)[0])


def reserved_bytes(device: int | None = None) -> tuple[int, int]:
    """What torch's allocator holds, and the most that it ever held (since its peak was reset), in bytes."""
    torch = _torch()
    if torch is None:
        return 0, 0
    return int(torch.cuda.memory_reserved(device)), int(torch.cuda.max_memory_reserved(device))


def free_up(wanted: int, device: int | None = None) -> int | None:
    """Give cached memory back until `wanted` bytes are free; return the bytes that are, None without CUDA.

    Cached memory is memory that vLLM cannot map. The cheapest step that helps comes first: a garbage collection of a
    training process takes longer than mapping a KV cache.
    """
    torch = _torch()
    free = free_bytes(device)
    if torch is None or free is None or free >= wanted:
        return free
    torch.cuda.empty_cache()
    free = free_bytes(device)
    if free is not None and free < wanted:
        gc.collect()
        torch.cuda.empty_cache()
        free = free_bytes(device)
    return free
