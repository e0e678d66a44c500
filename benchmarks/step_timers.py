"""The parts of a training step, timed from outside: methods of a trainer and of its engine, wrapped on the instance.

Also the callback that times whole steps, and writes everything to a file of JSON lines while it happens.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

GIB = 2**30

PARTS = ("generation", "sync", "check", "sleep", "old_logps", "rewards", "rollout", "forward", "backward", "optimizer")
"""In seconds of a step; together they are the step.

    generation   `LLM.generate`
    sync         TRL's `sync_weights` (`_move_model_to_vllm` below 0.28): merge and push, or the hand-over
    check        `trlpatch.hooks.lora_request` before a rollout, with what waking the engine takes
    sleep        `sleep` and `wake_up` of the engine, called by TRL or by trlpatch's hooks outside `check` and `sync`
    old_logps    log-probabilities of the rollout under the policy, before the loss is computed
    rewards      the reward functions
    rollout      what remains of `_generate_and_score_completions`: tokenizing, padding, advantages
    forward      `compute_loss`
    backward     what remains of `training_step`
    optimizer    what remains of the step: clipping, optimizer, logging, the dataloader
"""

TRAINING = ("forward", "backward", "optimizer")

_LOGGED = {
    "sampling/sampling_logp_difference/mean": "logp_difference",
    "completions/mean_length": "completion_length",
    "grad_norm": "grad_norm",
    "reward": "reward",
}


def engine_of(trainer: Any) -> Any:
    """Where TRL keeps it: on the trainer up to 0.27, in its VLLMGeneration from 0.28; Unsloth on the model as well."""
    for owner in (getattr(trainer, "vllm_generation", None), trainer):
        if (engine := getattr(owner, "llm", None)) is not None:
            return engine
    return trainer.model.vllm_engine


def places(trainer: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield (part, owner, name) of every function that belongs to a part and exists here."""
    import sys

    engine, hooks = engine_of(trainer), sys.modules.get("trlpatch.hooks")
    candidates = [
        ("generation", engine, "generate"),
        ("sync", getattr(trainer, "vllm_generation", None), "sync_weights"),
        ("sync", trainer, "_move_model_to_vllm"),
        ("check", hooks, "lora_request"),
        ("sleep", engine, "sleep"),
        ("sleep", engine, "wake_up"),
        ("sleep", hooks, "sleep"),
        ("sleep", hooks, "wake_up"),
        ("old_logps", trainer, "_get_per_token_logps_and_entropies"),
        ("old_logps", trainer, "_get_per_token_logps"),
        ("rewards", trainer, "_calculate_rewards"),
        ("rollout", trainer, "_generate_and_score_completions"),
        ("forward", trainer, "compute_loss"),
        ("backward", trainer, "training_step"),
    ]
    for part, owner, name in candidates:
        if owner is not None and callable(getattr(owner, name, None)):
            yield part, owner, name


class Parts:
    """Seconds of each part since the last `take`; the time of a part inside another counts for the inner one."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._open: list[tuple[str, list[float]]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self.found: set[str] = set()

    def watch(self, trainer: Any) -> None:
        """Wrap what `places` finds."""
        for part, owner, name in places(trainer):
            setattr(owner, name, self._timed(part, getattr(owner, name)))
            self.found.add(part)

    def take(self) -> dict[str, float]:
        """Return the seconds, and start from zero."""
        taken = {part: self._seconds[part] for part in self.found}
        self._seconds.clear()
        return taken

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # The loss calls the log-probabilities too; these are the forward pass.
            if part == "old_logps" and any(name == "forward" for name, _ in self._open):
                return call(*args, **kwargs)
            self._settle()
            inner = [0.0]
            self._open.append((part, inner))
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._settle()
                elapsed = time.perf_counter() - started
                self._open.pop()
                self._seconds[part] += elapsed - inner[0]
                if self._open:
                    self._open[-1][1][0] += elapsed

        return timed


def slow_down(trainer: Any, delays: dict[str, float]) -> None:
    """Make every call of a part take so many seconds more."""
    for part, owner, name in list(places(trainer)):
        if part in delays:
            setattr(owner, name, _delayed(getattr(owner, name), delays[part]))


def _delayed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    @functools.wraps(call)
    def delayed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return call(*args, **kwargs)

    return delayed


def settle() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Lines:
    """A file of JSON lines that another process reads, also when this one dies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **values: Any) -> None:
        """Append one event and when it happened."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return the events, without a last one that was cut short."""
        events = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):
                events.append(json.loads(line))
        return events


def callback(trainer: Any, lines: Lines, *, warmup: int, steps: int) -> Any:
    """Make the transformers callback that reports every step.

    A step lasts from the end of the one before to its own end, where the device is waited for. After `warmup` and
    `steps` the parts are watched, which makes steps slower: what they sum up to is not the time of a step.
    """
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    parts = Parts(settle)

    class Callback(TrainerCallback):  # type: ignore[misc]
        started: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.started is None:
                settle()
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            settle()
            now = time.perf_counter()
            assert self.started is not None
            done = state.global_step
            phase = "warmup" if done <= warmup else "timed" if done <= warmup + steps else "parts"
            entry: dict[str, Any] = {"number": done, "phase": phase, "seconds": now - self.started}
            if phase == "parts":
                taken = parts.take()
                entry["parts"] = {**taken, "optimizer": entry["seconds"] - sum(taken.values())}
            if cuda:
                entry["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
                torch.cuda.reset_peak_memory_stats()
            lines.write("step", **entry)
            if done == warmup + steps:
                parts.watch(trainer)
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            kept = {ours: logs[theirs] for theirs, ours in _LOGGED.items() if theirs in (logs or {})}
            if kept:
                lines.write("log", number=state.global_step, **kept)

    return Callback()
