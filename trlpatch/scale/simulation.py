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
    run = _Synchronous(costs)
    for _ in range(steps):
        run.step([setting.lengths.sample(generator) for _ in range(setting.completions)])
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
    _before: float | None = None

    def step(self, lengths: Sequence[int]) -> None:
        setting = self.costs.setting
        generation, busy = generate(self.costs, lengths)
        training = training_s(self.costs, list(lengths))
        if setting.mode == "prefetch":
            # Beside the training of this batch the one after it is generated; in the mean it is one as this.
            trained = training if self._before is None else self._before
            self._before = training
            self.step_s.append(max(generation, trained) + self.costs.sync)
        else:
            self.step_s.append(generation + training + self.costs.sync)
        self.generation_s.append(generation)
        self.training_s.append(training)
        self.tokens += sum(lengths)
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

    They are dealt out one by one, as to idle engines by load; the first of a group computes the prompt.
    """
    setting = costs.setting
    engines = [SimulatedEngine(costs.engine, setting.slots) for _ in range(min(setting.engines, len(lengths)))]
    for at, length in enumerate(lengths):
        prefill = setting.prompt_tokens / setting.generations
        engines[at % len(engines)].submit(0.0, Request(at, setting.prompt_tokens, length, prefill))
    return max(engine.drain()[-1][0] for engine in engines), sum(engine.busy for engine in engines)
