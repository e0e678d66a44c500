"""Whole steps of a trainer on Ray engines: the time of generation and sync in each, and what engines have done."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.engine_watch import peak_memory
from benchmarks.step_timers import Lines, StepClock, sync_calls
from benchmarks.step_ways import Order

_KEPT = ("loss", "reward", "completions/mean_length", "sampling/sampling_logp_difference/mean", "ratio")
_PREFIXES = ("ray/", "perf/", "sample/", "rollout/", "num_steps_off_policy", "async")
"""What of a trainer's log is written down."""


class Steps(StepClock):
    """Reports every step of one trainer; nothing waits for it. Without Ray `engines` is None."""

    def __init__(self, trainer: Any, engines: Any, order: Order, lines: Lines) -> None:
        super().__init__(lines, warmup=order.warmup, cuda=order.cuda)
        self._engines = engines
        self._seconds = {"generation": 0.0, "sync": 0.0}
        self._version, self._sampled, self._tokens = 0, 0, [0] * (len(engines.handles) if engines else 0)
        owners = (getattr(trainer, "vllm_generation", None), trainer)
        client = next((found for one in owners if (found := getattr(one, "vllm_client", None)) is not None), None)
        engine = next((found for one in owners if (found := getattr(one, "llm", None)) is not None), None)
        for owner, name in sync_calls(trainer):
            setattr(owner, name, self._timed("sync", getattr(owner, name)))
        for owner in (engine, client):
            if callable(getattr(owner, "generate", None)):
                owner.generate = self._timed("generation", owner.generate)  # type: ignore[union-attr]

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                found = call(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - started
            if part == "generation":
                self._sampled += _tokens_of(found)
            return found

        return timed

    def kept(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Return the numbers of _KEPT and _PREFIXES."""
        return {
            name: value
            for name, value in logs.items()
            if (name in _KEPT or name.startswith(_PREFIXES)) and isinstance(value, int | float)
        }

    def added(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return what was counted since the last call."""
        found: dict[str, Any] = {f"{part}_s": seconds for part, seconds in self._seconds.items() if seconds}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        if self._engines is None:
            sampled, self._sampled = self._sampled, 0
            return found | {"engine_tokens": [sampled]}
        health = self._engines.health()
        tokens = [one.tokens if hasattr(one, "tokens") else was for one, was in zip(health, self._tokens, strict=True)]
        found |= {"engine_tokens": [now - was for now, was in zip(tokens, self._tokens, strict=True)]}
        self._tokens = tokens
        if self._engines.adapter_version != self._version:
            self._version = self._engines.adapter_version
            found |= {"to_engines_s": self._engines.sync_seconds, "sync_bytes": self._engines.adapter_bytes}
        return found


def _tokens_of(outputs: Any) -> int:
    """Count what was sampled, as an engine or TRL's client of a server says it."""
    if isinstance(outputs, dict):
        return sum(map(len, outputs.get("completion_ids", [])))
    return sum(len(one.token_ids) for output in outputs for one in output.outputs)


def engines_memory(engines: Any, *, cuda: bool) -> list[float]:
    """Return GiB of each engine: of the fullest of its GPUs, or on a CPU the most that its process has held."""
    found: list[dict[str, float]] = engines.on_each("call", _memory_there, cuda)
    return [one.get("used_gib", one["peak_gib"]) for one in found]


def _memory_there(llm: Any, cuda: bool) -> dict[str, float]:
    """In an engine's process."""
    return peak_memory(cuda)
