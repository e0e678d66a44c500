"""Simulation of a run: engines, trainer, syncs and staleness step by step, with lengths drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from trlpatch.scale.asynchronous import AsynchronousRun
from trlpatch.scale.calibration import Calibration
from trlpatch.scale.costs import Costs
from trlpatch.scale.prediction import Prediction, training_s
from trlpatch.scale.setting import Setting
from trlpatch.scale.simulated_engine import Request, SimulatedEngine

STEPS = 20
WARMUP = 5


def simulate(
    setting: Setting,
    calibration: Calibration | None = None,
    *,
    steps: int = STEPS,
    warmup: int = WARMUP,
    seed: int = 0,
) -> Prediction:
    """Return the mean step of a simulated run.

    The same seed draws the same lengths in the same order in every mode and on any number of GPUs.

    Args:
        setting: what runs.
        calibration: its costs; the packaged one by default.
        steps: that are counted.
        warmup: steps before these; asynchronous runs need about `max_staleness`.
        seed: of the lengths.
    """
    costs = Costs(setting, calibration or Calibration.load())
    generator = random.Random(seed)
    if setting.mode == "async":
        return AsynchronousRun(costs, generator).run(warmup + setting.max_staleness, steps)
    batches = [[setting.lengths.sample(generator) for _ in range(setting.completions)] for _ in range(steps + 1)]
    run = _Synchronous(costs)
    ahead = int(setting.mode == "prefetch")
    for at in range(steps):
        run.step(batches[at + ahead], batches[at])
    return run.prediction()


@dataclass
class _Synchronous:
    """Steps with a barrier: colocated, sync and prefetch. The times of a step depend on its own lengths alone."""

    costs: Costs
    step_s: list[float] = field(default_factory=list)
    generation_s: list[float] = field(default_factory=list)
    training_s: list[float] = field(default_factory=list)
    tokens: int = 0
    busy: float = 0.0

    def step(self, generated: Sequence[int], trained: Sequence[int]) -> None:
        """Generate one batch and train on one: the same, or with prefetch the one before, at the same time."""
        generation, busy = generate(self.costs, generated)
        training = training_s(self.costs, trained)
        together = max if self.costs.setting.mode == "prefetch" else sum
        self.step_s.append(together((generation, training)) + self.costs.sync)
        self.generation_s.append(generation)
        self.training_s.append(training)
        self.tokens += sum(trained)
        self.busy += busy

    def prediction(self) -> Prediction:
        setting, elapsed = self.costs.setting, sum(self.step_s)
        return Prediction(
            step_s=fmean(self.step_s), generation_s=fmean(self.generation_s), training_s=fmean(self.training_s),
            sync_s=self.costs.sync, tokens_per_s=self.tokens / elapsed,
            engines_busy=self.busy / (setting.engines * elapsed), trainer_busy=sum(self.training_s) / elapsed,
            staleness=float(setting.mode == "prefetch"),
        )  # fmt: skip


def generate(costs: Costs, lengths: Sequence[int]) -> tuple[float, float]:
    """Return (seconds until the last is done, seconds of all engines that they decoded), for completions in order.

    They are dealt out piece by piece (`Setting.piece`), as to idle engines by load; the first of a group computes the
    prompt.
    """
    setting = costs.setting
    prefill = setting.prompt_tokens / setting.generations
    pieces = [lengths[at : at + setting.piece] for at in range(0, len(lengths), setting.piece)]
    engines = [SimulatedEngine(costs.engine, setting.slots) for _ in range(min(setting.engines, len(pieces)))]
    for at, piece in enumerate(pieces):
        for length in piece:
            engines[at % len(engines)].submit(0.0, Request(at, setting.prompt_tokens, length, prefill))
    return max(engine.drain()[-1][0] for engine in engines), sum(engine.busy for engine in engines)
