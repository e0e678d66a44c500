"""How the engines of a benchmark start: as vLLM does by itself, or in a part of the time."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64]


def engine_start(how: str, sequences: int = SIZES[-1]) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for "eager", "graphs" or "compiled" (vLLM's own).

    "graphs": of whole decoding steps of up to `sequences` sequences, without torch.compile. A larger batch runs
    without a graph, many times slower, and nothing says so.
    """
    if how == "eager":
        return {"enforce_eager": True}
    if how == "compiled":
        return {}
    sizes = [*(size for size in SIZES if size < sequences), *range(SIZES[-1] + 32, sequences, 32), sequences]
    return {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
            "cudagraph_specialize_lora": False,
        }
    }


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
