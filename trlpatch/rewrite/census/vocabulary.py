"""Names by which TRL's source can reach an engine, the forms in which that is harmless, and the modules set apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trlpatch.source.releases import ReleaseRange
from trlpatch.trl_names import ENGINE_ATTRIBUTES, SYNC_METHODS

ENGINES = frozenset(ENGINE_ATTRIBUTES)
HOLDER = "vllm_generation"
"""Attribute of a trainer that holds its `VLLMGeneration` (TRL 0.28)."""
GENERATION = "VLLMGeneration"
"""The class that owns the engine of a trainer since TRL 0.28."""

CONSTRUCTORS = frozenset({"LLM", "LLMEngine", "AsyncLLM", "AsyncLLMEngine", "EngineCore", "EngineCoreClient"})
"""vLLM's classes that are, or make, an engine."""

ENGINE_ONLY = frozenset(
    {
        "apply_model",
        "beam_search",
        "collective_rpc",
        "driver_worker",
        "engine_core",
        "llm_engine",
        "load_weights",
        "model_runner",
        "reload_weights",
        "wake_up",
    }
)
"""Attributes that nothing in TRL but an engine or a part of it has, whatever they are read from."""

ROLLOUTS = ("generate", "chat")
HARMLESS_CALLS = frozenset({"get_tokenizer", "reset_prefix_cache"})
"""Methods of an engine that neither sample nor touch weights."""

HARMLESS_PATH = ("llm_engine", "model_config")
"""What TRL asks for the context length, from 0.26 on."""

PUSH_PATH = ("llm_engine", "model_executor", "driver_worker", "model_runner", "model")
"""The engine's model, into which the sync methods push."""

HELD_CALLS = frozenset({"generate", "sync_weights"})
"""Methods of `VLLMGeneration`, whose bodies are patched."""

PUSH_HELPER = re.compile(r"_(?:sync|push|move|load|update)\w*vllm\w*")
"""Names of the methods between which the sync methods divide their pushes, in every release."""


def names_push_helper(name: str) -> bool:
    """Tell whether `name` is that of a part of a sync method, which only the sync method may call."""
    return PUSH_HELPER.fullmatch(name) is not None and name not in SYNC_METHODS


MERGES = frozenset({"merge_adapter", "unmerge_adapter"})
"""Methods of a PEFT model between which its base weights are not the engine's."""

_WORDS = sorted({*ENGINES, HOLDER, *CONSTRUCTORS, *ENGINE_ONLY, *MERGES})
MENTIONED = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b|\b{PUSH_HELPER.pattern}\b|\bvllm\S*\s+import\s*\(?\s*\*")
"""Found in the text of every file in which the census can find anything: each finding is about one of these words."""


@dataclass(frozen=True)
class OwnProcess:
    """A module that runs an engine in a process of its own, which no trainer of this process rolls out on."""

    module: str
    trl: ReleaseRange
    reason: str


OWN_PROCESS = (
    OwnProcess(
        "scripts/vllm_serve.py",
        ReleaseRange(">=0.18"),
        "the server's engine: `trl vllm-serve` is its own process",
    ),
    OwnProcess("experimental/ssd/ssd_eval.py", ReleaseRange(">=1.2,<1.7"), "a script that evaluates a finished model"),
)
