"""What travels between the trainer's process and the engines' actors. Plain data; the adapter is `AdapterTensors`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trlpatch.engine.protocols import LoraRequest

BASE_ADAPTER = 0
"""The number of "no adapter"; versions of the live adapter count from 1."""
CHECKPOINT_WEIGHTS = "0"
"""The version of the weights that an engine was built from."""


@dataclass(frozen=True)
class Version:
    """What an engine samples with: the live adapter's number and the name of the base weights."""

    adapter: int = BASE_ADAPTER
    weights: str = CHECKPOINT_WEIGHTS

    def __str__(self) -> str:
        return f"adapter {self.adapter or 'none'}, weights {self.weights}"


def following(weights_version: str) -> str:
    """The name of the weights that are sent after those."""
    return str(int(weights_version) + 1)


@dataclass(frozen=True)
class RolloutRequest:
    """Some prompts for one engine, answered together."""

    prompts: Sequence[Any]
    """As `vllm.LLM.generate` takes them: texts, `{"prompt_token_ids": [...]}`, multi-modal dictionaries; conversations
    for "chat"."""
    sampling_params: Sequence[Any] | None
    """One `vllm.SamplingParams` a prompt; all `n` completions of a prompt are made by the same engine. None: the
    model's defaults."""
    adapter: int | None = BASE_ADAPTER
    """Version of the live adapter to sample with; BASE_ADAPTER for none; None for whatever the engine holds."""
    lora_request: LoraRequest | None = None
    """A saved adapter, which every node can read; it comes before `adapter`."""
    weights: str | None = None
    """Version of the base weights to sample with; None for whatever the engine holds."""
    method: str = "generate"
    """Of `vllm.LLM`: "generate" or "chat"."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of it."""
    key: str = ""
    """For `abort`."""


@dataclass(frozen=True)
class RolloutResponse:
    """The answers to a RolloutRequest, in the order of its prompts."""

    outputs: list[Any]
    """`vllm.RequestOutput`, one a prompt."""
    first_version: Version
    """What the first token was sampled with."""
    last_version: Version
    """What the last one was; another one when an update came between two steps."""
    engine: int
    seconds: float
    tokens: int
    """Sampled, over all completions."""

    @property
    def mixed(self) -> bool:
        """Were weights or adapter changed while these requests ran?"""
        return self.first_version != self.last_version


@dataclass(frozen=True)
class EngineInfo:
    """What an actor says of its engine once it is up."""

    index: int
    model: str
    vllm_config: Any
    """The parts of the engine's own `VllmConfig` that are configuration alone, so that the trainer's process can ask
    what it asks of any engine."""
    vllm_version: str
    node: str
    """IP address of the node."""
    pid: int
    devices: tuple[str, ...]
    """The GPUs that Ray gave it, as CUDA_VISIBLE_DEVICES names them."""
    seconds: float
    """From the start of the build."""
    lora_layers: str | None = None
    supported_tasks: tuple[str, ...] = ("generate",)


@dataclass(frozen=True)
class EngineHealth:
    """How an engine does at this moment; asked without waiting for a step."""

    index: int
    state: str
    """"loading", "running", "paused", "asleep", "lost" or "stopped"."""
    waiting: int
    """Requests that are queued and not added to the engine yet."""
    running: int
    """Requests in the engine that are not answered to their end."""
    version: Version
    steps: int
    seconds_since_step: float
    """Since the last step ended, while requests run; 0.0 while there are none."""
    tokens: int
    """Sampled since the engine is up."""
    reason: str = ""
    """Why it is lost."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further figures by name."""
