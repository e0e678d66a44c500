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


def sync_calls(trainer: Any) -> Iterator[tuple[Any, str]]:
    """Yield (owner, name) of what takes weights to an engine before a rollout.

    A trainer has one of them: `VLLMGeneration.sync_weights` from 0.28 on, `_move_model_to_vllm` of the trainer below,
    `_sync_weight` of AsyncGRPOTrainer.
    """
    owners = (getattr(trainer, "vllm_generation", None), trainer, trainer)
    for owner, name in zip(owners, ("sync_weights", "_move_model_to_vllm", "_sync_weight"), strict=True):
        if owner is not None and callable(getattr(owner, name, None)):
            yield owner, name


def places(trainer: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield (part, owner, name) of every function that belongs to a part and exists here."""
    import sys

    engine, hooks = engine_of(trainer), sys.modules.get("trlpatch.hooks")
    candidates = [
        ("generation", engine, "generate"),
        *(("sync", owner, name) for owner, name in sync_calls(trainer)),
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


class StepClock:
    """Writes a line for every step of one trainer and for every log.

    A step lasts from the end of the one before to its own end, where the device is waited for. `cpu_s` are the seconds
    that all threads of this process had a core meanwhile: what else runs on the machine changes them less than
    `seconds`.
    """

    def __init__(self, lines: Lines, *, warmup: int, cuda: bool) -> None:
        self.lines, self.warmup, self.cuda = lines, warmup, cuda

    def phase(self, done: int) -> str:
        """Say what the step is of which so many are done."""
        return "warmup" if done <= self.warmup else "timed"

    def added(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return what the line of a step has beside number, phase and seconds; overridden."""
        return {}

    def written(self, done: int) -> None:
        """Do what is due between two steps, which counts for neither; overridden."""

    def kept(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Return what of a trainer's log is written down; overridden."""
        return {}

    def callback(self) -> Any:
        """Make the transformers callback."""
        import torch
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            started: tuple[float, float] | None = None

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if self.started is None:
                    self.started = _now()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                ended, done = _now(), state.global_step
                assert self.started is not None
                seconds, cpu = (now - then for now, then in zip(ended, self.started, strict=True))
                entry = {"number": done, "phase": clock.phase(done), "seconds": seconds, "cpu_s": cpu}
                entry |= clock.added(entry)
                if clock.cuda:
                    entry["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
                clock.lines.write("step", **entry)
                clock.written(done)
                self.started = _now()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if kept := clock.kept(logs or {}):
                    clock.lines.write("log", number=state.global_step, **kept)

        return Callback()


def _now() -> tuple[float, float]:
    """Wait for the device, and return the time and that of this process on cores."""
    settle()
    return time.perf_counter(), time.process_time()


class _PartsClock(StepClock):
    """See `callback`."""

    def __init__(self, trainer: Any, lines: Lines, *, warmup: int, steps: int, cuda: bool) -> None:
        super().__init__(lines, warmup=warmup, cuda=cuda)
        self._trainer, self._whole, self._parts = trainer, warmup + steps, Parts(settle)

    def phase(self, done: int) -> str:
        return super().phase(done) if done <= self._whole else "parts"

    def added(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["phase"] != "parts":
            return {}
        taken = self._parts.take()
        return {"parts": {**taken, "optimizer": entry["seconds"] - sum(taken.values())}}

    def written(self, done: int) -> None:
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if done == self._whole:
            self._parts.watch(self._trainer)

    def kept(self, logs: dict[str, Any]) -> dict[str, Any]:
        return {ours: logs[theirs] for theirs, ours in _LOGGED.items() if theirs in logs}


def callback(trainer: Any, lines: Lines, *, warmup: int, steps: int) -> Any:
    """Make the transformers callback that reports every step, each with the memory of its own.

    After `warmup` and `steps` the parts are watched, which makes steps slower: what they sum up to is not the time of
    a step.
    """
    import torch

    return _PartsClock(trainer, lines, warmup=warmup, steps=steps, cuda=torch.cuda.is_available()).callback()
