"""Which CUDA graphs an engine with one adapter captures: enough for rollouts, in half the time.

vLLM captures a graph per batch size, 51 of them up to 512 (vllm/config/vllm.py), and with LoRA loads dummy adapters
into every layer before each. At 7B that took 29 s of a start on an H200, without LoRA 2 s for 19 sizes (vLLM 0.26.0).
A batch runs in the next larger graph, so sizes further apart cost a few padded rows and no other kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trlpatch.engine.memory import device
from trlpatch.engine.vllm_source import class_fields

LARGEST = 512
"""As vLLM's own (`max_cudagraph_capture_size`), but for Blackwell."""
_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, LARGEST, 64))


def capture_sizes(max_num_seqs: int | None) -> list[int]:
    """Return the batch sizes to capture, ascending, the last of them the largest batch that can decode at once."""
    largest = min(LARGEST, max_num_seqs or LARGEST)
    return [*(size for size in _SIZES if size < largest), largest]


def compilation_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `compilation_config` for an engine that is built with `arguments`; {} where there is nothing to say.

    What the user says of graphs or compilation is the last word: then this is {}. So it is for speculative decoding,
    where a batch has several tokens a sequence.
    """
    said = ("compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "speculative_config")
    if arguments.get("enforce_eager") or any(arguments.get(name) is not None for name in said):
        return {}
    known = class_fields("config/compilation.py", "CompilationConfig") or frozenset()
    wanted: dict[str, Any] = {
        "cudagraph_capture_sizes": capture_sizes(arguments.get("max_num_seqs")),
        # A second set of graphs, for batches without an adapter: a trainer's rollouts have one.
        "cudagraph_specialize_lora": False,
    }
    if device.capability() >= (10, 0):  # vLLM goes up to 1024 there
        del wanted["cudagraph_capture_sizes"]
    return {name: value for name, value in wanted.items() if name in known}
