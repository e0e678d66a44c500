"""Triton kernels: is there a Triton to run them with, and what it calls torch's dtypes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trlpatch.options import read_switch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


def wanted(device: torch.device, module: object, switch: str) -> bool:
    """Can a kernel's module (None: there is no Triton) run on the device, and is its switch not off?"""
    if module is None or read_switch(switch) is False:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def owners(programs: list[int], device: torch.device) -> Tensor:
    """Number of the tensor of each program, [sum(programs)] int32, where tensor i has `programs[i]` of them.

    Spread on the device: a 7B model has 800,000 tiles, for which the host takes tens of milliseconds.
    """
    import torch

    numbers = torch.arange(len(programs), dtype=torch.int32, device=device)
    counts = torch.tensor(programs, dtype=torch.int64).to(device)
    return numbers.repeat_interleave(counts, output_size=sum(programs))


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """For the time of a `with`: launches go to this device."""
    import torch

    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            yield
    else:
        yield
