"""What `vllm.LLM` asks of its workers, asked of the workers of all engines on Ray actors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class WorkerCalls(ABC):
    """Methods of `vllm.LLM` that run a function in engines' processes, between two steps."""

    @abstractmethod
    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every actor, at once, and give the answers in the order of engines."""

    @abstractmethod
    def of_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(llm, *args)` in the first engine's process."""

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every worker of every engine; one answer a worker."""
        answers = self.on_each("call", _collective_rpc, method, args, kwargs or {}, timeout=timeout)
        return [answer for engine in answers for answer in engine]

    def apply_model(self, func: Callable[..., Any]) -> list[Any]:
        """As `vllm.LLM.apply_model`, on every engine."""
        return [answer for engine in self.on_each("call", _apply_model, func) for answer in engine]

    def get_tokenizer(self) -> Any:
        """The engines' tokenizer."""
        return self.of_first(_get_tokenizer)

    def get_default_sampling_params(self) -> Any:
        """What is sampled with where nothing is said."""
        return self.of_first(_get_default_sampling_params)


def _collective_rpc(llm: Any, method: Any, args: Any, kwargs: Any) -> Any:
    return llm.collective_rpc(method, args=args, kwargs=kwargs)


def _apply_model(llm: Any, function: Any) -> Any:
    return llm.apply_model(function)


def _get_tokenizer(llm: Any) -> Any:
    tokenizer = llm.get_tokenizer()
    if type(tokenizer).__name__.startswith("TokenizerPool"):
        # vLLM 0.23's pool arrives as None (vllm-project/vllm#45433); what it is a pool of arrives as it is.
        _, (tokenizer, *_) = tokenizer.__reduce__()
    return tokenizer


def _get_default_sampling_params(llm: Any) -> Any:
    return llm.get_default_sampling_params()
