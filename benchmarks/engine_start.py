"""How the engines of a benchmark start: as vLLM does by itself, or in a part of the time."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

GRAPHS = {
    "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 48, 64],
    "cudagraph_specialize_lora": False,
}  # fmt: skip
"""Graphs of whole decoding steps of at most 64 sequences, without torch.compile."""


def engine_start(how: str) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for "eager", "graphs" (GRAPHS) or "compiled" (vLLM's own)."""
    if how == "eager":
        return {"enforce_eager": True}
    return {"compilation_config": dict(GRAPHS)} if how == "graphs" else {}


def build_engines_with(**arguments: Any) -> None:
    """Have every engine of this process built with these, whatever is said otherwise."""
    import vllm

    construct = vllm.LLM.__init__

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **{**kwargs, **arguments})

    vllm.LLM.__init__ = constructed


def keep_weights_as_they_are() -> None:
    """Have vLLM's CPU engine not repack its weights (0.28), so that stock's push can load them."""
    with contextlib.suppress(ImportError):
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False
