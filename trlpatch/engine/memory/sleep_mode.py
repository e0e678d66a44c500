"""Sleep mode: should an engine be built with `enable_sleep_mode=True`, and can it be?"""

from __future__ import annotations

import os
import sys

from trlpatch.engine.memory import cumem
from trlpatch.engine.memory.device import GIB
from trlpatch.options import SLEEP, SLEEP_ALIAS, read_switch

_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def sleep_default() -> bool:
    """Is an engine built with sleep mode when nobody says? TRLPATCH_SLEEP, then UNSLOTH_VLLM_STANDBY, then: on CUDA.

    Raises:
        InvalidOption: a value is neither yes nor no.
    """
    for name in (SLEEP, SLEEP_ALIAS):
        said = read_switch(name)
        if said is not None:
            return said
    return _cuda()


def unsupported_reason() -> str | None:
    """Why an engine with sleep mode cannot be built in this process now; None when it can."""
    if not _cuda():
        return "sleep mode needs CUDA, and torch finds no device"
    for name in _ALLOCATOR_SETTINGS:
        settings = os.environ.get(name, "").replace(" ", "").lower()
        if "expandable_segments:true" in settings:
            # vLLM asserts up to 0.19, and reads only the older name up to 0.30; expandable segments stay mapped.
            return (
                f"{name}={os.environ[name]} makes torch's segments expandable, and vLLM's sleep cannot unmap those; "
                "take expandable_segments out of it before torch starts CUDA"
            )
    instance = cumem.allocator()
    used = 0 if instance is None else int(instance.get_current_usage())
    if used:
        return (
            f"another engine with sleep mode is alive in this process ({used / GIB:.2f} GiB in its pools), and vLLM's "
            "allocator serves one; delete it first (del llm; gc.collect()), or build this one without sleep"
        )
    return None


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available()) and sys.platform == "linux"
