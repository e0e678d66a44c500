"""A `vllm.LLM` without vLLM: one token a request and step, as slow as it is told to be."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class FakeOutput:
    request_id: str
    prompt: Any
    outputs: list[Any]
    finished: bool = True
    lora: str = ""


@dataclass
class FakeParams:
    max_tokens: int = 2
    n: int = 1


@dataclass
class FakeInner:
    """`LLMEngine`: every request gets a token a step."""

    fail_at: int | None = None
    steps: int = 0
    running: dict[str, tuple[Any, Any, Any, list[str]]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    gate: threading.Semaphore | None = None
    """A step waits for a permit where there is a gate."""
    stepping: threading.Event = field(default_factory=threading.Event)
    holds: str = "base"
    vllm_config: Any = field(default_factory=lambda: SimpleNamespace(lora_config=None))

    def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any = None) -> str:
        if prompt == "bad":
            raise ValueError("a bad prompt")
        self.running[request_id] = (prompt, params, lora_request, [])
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.aborted.append(name)
            self.running.pop(name, None)

    def step(self) -> list[FakeOutput]:
        self.stepping.set()
        if self.gate is not None:
            self.gate.acquire()
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("CUDA error: an illegal memory access")
        ended = []
        for name, (prompt, params, lora, tokens) in list(self.running.items()):
            tokens.append(self.holds)
            if len(tokens) == params.max_tokens:
                del self.running[name]
                completions = [SimpleNamespace(token_ids=list(tokens)) for _ in range(params.n)]
                ended.append(FakeOutput(name, prompt, completions, lora=getattr(lora, "lora_name", "")))
        return ended


class FakeLLM:
    """`LLM.generate` renders, adds and steps, as vLLM's does."""

    def __init__(self, **settings: Any) -> None:
        self.llm_engine = FakeInner(**settings)
        self._count = 0

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(
        self, prompts: list[Any], sampling_params: Any = None, use_tqdm: bool = True, lora_request: Any = None
    ) -> list[FakeOutput]:
        for prompt, params in zip(prompts, sampling_params or [FakeParams()] * len(prompts), strict=True):
            name = str(self._count)
            self._count += 1
            self.llm_engine.add_request(name, prompt, params, lora_request=lora_request)
        found = []
        while self.llm_engine.has_unfinished_requests():
            found += self.llm_engine.step()
        return found
