"""Prediction: what the closed form and the simulator say of one setting, in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trlpatch.scale.costs import Costs
from trlpatch.scale.setting import Setting


@dataclass(frozen=True)
class Prediction:
    """Seconds and shares of a step, on average.

    Attributes:
        step_s: from one optimizer step to the next.
        generation_s: from the first request of a batch to its last answer. Asynchronous: what the engines need for a
            batch at the load that `max_staleness` allows (closed form), or how long of a step one decodes (simulated).
        training_s: forward, backward, optimizer, old log-probabilities, rewards.
        sync_s: from the end of an optimizer step until every engine has the new version.
        tokens_per_s: completion tokens that are trained on.
        engines_busy: share of the time that an engine decodes something.
        trainer_busy: share of the time that is training.
        staleness: versions that a sample is behind when it is trained on.
        dropped: share of what is generated that is dropped because it is too old.
    """

    step_s: float
    generation_s: float
    training_s: float
    sync_s: float
    tokens_per_s: float
    engines_busy: float
    trainer_busy: float
    staleness: float = 0.0
    dropped: float = 0.0

    @property
    def steps_per_s(self) -> float:
        """Optimizer steps per second."""
        return 1 / self.step_s


def share_of(setting: Setting) -> int:
    """Return the completions of the trainer GPU that has most."""
    return -(-setting.completions // setting.trainer_gpus)


def training_s(costs: Costs, lengths: Sequence[int]) -> float:
    """Return the seconds to train on a batch with these completion lengths."""
    setting = costs.setting
    if setting.pads:
        width = setting.prompt_tokens + max(lengths)
        return costs.training(share_of(setting) * width, width)
    whole = [setting.prompt_tokens + length for length in lengths]
    tokens = max(sum(whole) / setting.trainer_gpus, max(whole))
    return costs.training(tokens, sum(length**2 for length in whole) / sum(whole))
