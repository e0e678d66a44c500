"""Translation of vLLM's errors while an engine is built: what they mean for the caller of `from_pretrained`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trlpatch.engine.memory.sleep_mode import unsupported_reason as why_no_sleep_mode
from trlpatch.errors import EngineBuildFailed, EngineError, LoraNotSupported, NotEnoughMemory, TrlpatchError
from trlpatch.exception_chain import exception_chain
from trlpatch.loading.load_config import LoadConfig


@dataclass(frozen=True)
class _Known:
    """A message of vLLM or torch, as a pattern, and what to do about it."""

    says: str
    error: type[EngineError]
    advice: str


_KNOWN = (
    _Known(
        r"out of memory",
        NotEnoughMemory,
        "the device has too little memory for the engine beside what else is on it. Set gpu_memory_utilization to 0.3 "
        "to 0.5, or lower max_seq_length; load_in_4bit=True and float8_kv_cache=True take less; enforce_eager=True "
        "saves the CUDA graphs",
    ),
    _Known(
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        NotEnoughMemory,
        "gpu_memory_utilization={gpu_memory_utilization:g} leaves too little for a KV cache of "
        "max_seq_length={max_seq_length} after the weights. Raise gpu_memory_utilization, or lower max_seq_length",
    ),
    _Known(
        r"[Ff]ree memory on device|[Aa]vailable memory on node|less than desired \w+ memory utilization",
        NotEnoughMemory,
        "gpu_memory_utilization={gpu_memory_utilization:g} asks for more memory than is free (of all memory, also of "
        "what others hold; on vLLM's CPU backend, of the machine's RAM). Lower it, or free memory",
    ),
    _Known(
        r"Error in memory profiling",
        EngineBuildFailed,
        "another process gave memory back while vLLM measured; try again when nothing starts or ends on the device",
    ),
    _Known(
        r"does not support LoRA", LoraNotSupported, "vLLM has no LoRA for this architecture. Set fast_inference=False"
    ),
    _Known(
        r"max_model_len \(\d+\) is greater than|[Uu]ser-specified max_model_len",
        EngineBuildFailed,
        "max_seq_length={max_seq_length} is more than the model was made for; set the number that vLLM names, or "
        "scale its positions with hf_overrides={{'rope_scaling': ...}}",
    ),
    _Known(
        r"one instance per process",
        EngineBuildFailed,
        "another engine with sleep mode lives in this process, and vLLM allows one. Delete it first, or set "
        "enable_sleep_mode=False",
    ),
)
_LINE = 2000
"""Characters of a line of vLLM's. The longest of those that are known, about max_model_len, has some 600."""

_ELSE = (
    "see vLLM's message; enforce_eager=True avoids compilation and CUDA graphs, fast_inference=False does without an "
    "engine, and `pip install --upgrade vllm` may cure it"
)


def translate(error: Exception, config: LoadConfig) -> TrlpatchError:
    """Return our error for one that building the engine raised; ours are returned as they are."""
    if isinstance(error, TrlpatchError):
        return error
    text = "\n".join(f"{type(one).__name__}: {one}" for one in exception_chain(error))
    known = next((one for one in _KNOWN if re.search(one.says, text)), None)
    values = {"gpu_memory_utilization": config.gpu_memory_utilization, "max_seq_length": config.max_seq_length}
    advice = _ELSE if known is None else known.advice.format(**values)
    made = EngineBuildFailed if known is None else known.error
    return made(
        f"trlpatch: building the vLLM engine for {config.model_name} failed: {type(error).__name__}: "
        f"{_telling_line(str(error), known)}\n{advice}. {_retry_advice()}"
    )


def _telling_line(message: str, known: _Known | None) -> str:
    """Return the line of a long message that says what is known."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    return next((line for line in lines if known is not None and re.search(known.says, line)), lines[0])[:_LINE]


def _retry_advice() -> str:
    """Return whether it can be tried again; ask after everything was taken down."""
    reason = why_no_sleep_mode()
    if reason is not None and "another engine" in reason:
        return (
            "The engine was taken down, but vLLM still holds memory of its sleep mode: to try again in this process, "
            "set enable_sleep_mode=False; a new process is clean"
        )
    return "The engine was taken down; it can be tried again in this process"
