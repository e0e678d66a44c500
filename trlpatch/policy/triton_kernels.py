"""Triton kernels: is there a Triton to run them with, and what it calls torch's dtypes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@cache
def kernel_module(name: str, kernel: str) -> Any:
    """Return the module `name` that has the kernel, or None where there is no Triton.

    vLLM puts a module of that name without a compiler into the process where Triton is missing.
    """
    try:
        module = import_module(name)
    except Exception:  # an incomplete Triton fails in ways of its own
        return None
    return module if callable(getattr(getattr(module, kernel), "run", None)) else None


@cache
def language(dtype: torch.dtype, *, bits: bool = False) -> Any:
    """Triton's name of a torch dtype, or of the unsigned integers of its size."""
    import torch
    import triton.language as tl

    if bits:
        return tl.uint32 if dtype == torch.float32 else tl.uint16
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def wanted(device: torch.device) -> bool:
    """Is it a GPU, or are kernels interpreted?"""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """For the time of a `with`: launches go to this device."""
    import torch

    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            yield
    else:
        yield
