"""Advice: how many rollout GPUs a setting wants, where more of them stop paying, and how to split a number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trlpatch.errors import InvalidSetting
from trlpatch.scale.calibration import Calibration
from trlpatch.scale.closed_form import predict
from trlpatch.scale.costs import Costs
from trlpatch.scale.prediction import Prediction
from trlpatch.scale.setting import Setting

MOST_GPUS = 512
ENOUGH = 0.9
"""A setting wants as many rollout GPUs as give this share of the speed that any number of them gives."""
PAYS = 1.1
"""Doubling the rollout GPUs pays where steps become faster by this factor."""


@dataclass(frozen=True)
class Advice:
    """What closed forms say about numbers of rollout GPUs.

    Attributes:
        rows: (rollout GPUs, prediction) for each doubling.
        wants: the fewest that give `ENOUGH` of the best.
        stops: from here on doubling them makes steps less than `PAYS` times as fast.
        best: the number with the fastest steps.
        bound: what a step with `wants` of them mostly waits for.
    """

    rows: tuple[tuple[int, Prediction], ...]
    wants: int
    stops: int
    best: int
    bound: str


def advise(setting: Setting, calibration: Calibration | None = None, *, most: int = MOST_GPUS) -> Advice:
    """Look at every number of rollout GPUs up to `most`; `rollout_gpus` of the setting is not looked at.

    Raises:
        InvalidSetting: the mode is colocated, which has none, or one engine has more GPUs than `most`.
    """
    if setting.mode == "colocated":
        raise InvalidSetting(
            "mode", setting.mode, "sync, prefetch or async: colocated engines have no GPUs of their own"
        )
    tensor_parallel = setting.tensor_parallel
    if most < tensor_parallel:
        raise InvalidSetting("most", most, f"{tensor_parallel} or more, the GPUs of one engine")
    known = calibration or Calibration.load()
    counts = range(tensor_parallel, most + 1, tensor_parallel)
    found = {count: predict(replace(setting, rollout_gpus=count), known) for count in counts}
    best = min(found, key=lambda count: (found[count].step_s, count))
    wants = next(count for count in counts if ENOUGH * found[count].step_s <= found[best].step_s)
    stops = next(
        (count for count in counts if 2 * count in found and found[count].step_s < PAYS * found[2 * count].step_s),
        counts[-1],
    )
    doubled = [count for count in (tensor_parallel * 2**power for power in range(10)) if count in found]
    return Advice(
        rows=tuple((count, found[count]) for count in doubled), wants=wants, stops=stops, best=best,
        bound=bound_of(replace(setting, rollout_gpus=wants), known),
    )  # fmt: skip


def bound_of(setting: Setting, calibration: Calibration | None = None) -> str:
    """Say what the largest part of a step is."""
    known = calibration or Calibration.load()
    costs, found = Costs(setting, known), predict(setting, known)
    longest = costs.engine.base * setting.lengths.longest_of(setting.completions)
    if setting.mode == "async":
        if found.training_s + found.sync_s >= 0.999 * found.step_s:
            return "the trainer" if found.training_s >= found.sync_s else "the weight sync"
        in_flight = (setting.max_staleness + 1) * setting.completions / setting.engines
        return "generation" if in_flight >= setting.slots else "generation, held back by max_staleness"
    parts = {
        "the trainer": found.training_s,
        "the weight sync": found.sync_s,
        "the longest completion": longest if longest > found.generation_s / 2 else 0.0,
        "generation": found.generation_s if longest <= found.generation_s / 2 else 0.0,
    }
    return max(parts, key=lambda name: parts[name])


def split(setting: Setting, gpus: int, calibration: Calibration | None = None) -> Setting:
    """Return the setting with `gpus` divided into trainer and rollout GPUs so that steps are fastest.

    Raises:
        InvalidSetting: there are too few for one trainer and one engine.
    """
    known = calibration or Calibration.load()
    if setting.mode == "colocated":
        return replace(setting, trainer_gpus=gpus)
    tensor_parallel = setting.tensor_parallel
    if gpus < tensor_parallel + 1:
        raise InvalidSetting("gpus", gpus, f"{tensor_parallel + 1} or more: a trainer and an engine")
    candidates = [
        replace(setting, trainer_gpus=gpus - rollout, rollout_gpus=rollout)
        for rollout in range(tensor_parallel, gpus, tensor_parallel)
    ]
    return min(candidates, key=lambda one: predict(one, known).step_s)
