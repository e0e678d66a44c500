"""Closed form of a step: expected seconds in every mode, without drawing a length.

A decoding step of b sequences costs `base + each*b + seen*context`, a line, so the expected time of one engine for n
independent completions that all fit is exact: the base for as many steps as the longest has, the rest for every token,

    base*E[max of n] + each*n*E[L] + seen*n*(prompt*E[L] + E[L^2]/2).

An asynchronous step is as long as the trainer needs, or as the engines need with as many completions on their way as
`max_staleness` allows (Little's law), those that will be too old included.

What is approximate: the engine that ends last is taken to hold the longest of the whole batch, and completions beyond
an engine's slots are taken to follow each other without gaps. tests/scale compare both with the simulator.
"""

from __future__ import annotations

from trlpatch.scale.calibration import Calibration
from trlpatch.scale.costs import Costs
from trlpatch.scale.prediction import Prediction, share_of
from trlpatch.scale.setting import Setting

_HALVINGS = 50
"""Of the interval that an asynchronous step is looked for in."""
_STARTS = 8
"""When within a step groups start, to average over."""
_LEAST = 1e-6
"""Share of groups that are young enough, at least: no step is endless."""


def predict(setting: Setting, calibration: Calibration | None = None) -> Prediction:
    """Return the expected step of a setting."""
    costs = Costs(setting, calibration or Calibration.load())
    training, sync = expected_training(costs), costs.sync
    if setting.mode == "async":
        return _asynchronous(costs, training)
    generation = expected_generation(costs)
    overlapped = setting.mode == "prefetch"
    step = (max(generation, training) if overlapped else generation + training) + sync
    busy = _busy(costs) / (setting.engines * step)
    return Prediction(
        step_s=step, generation_s=generation, training_s=training, sync_s=sync,
        tokens_per_s=setting.completions * setting.lengths.mean / step,
        engines_busy=min(1.0, busy), trainer_busy=training / step, staleness=float(overlapped),
    )  # fmt: skip


def expected_generation(costs: Costs) -> float:
    """Return seconds from the first request of a batch to its last answer, over all engines."""
    setting, engine = costs.setting, costs.engine
    lengths, each = setting.lengths, setting.most_of_an_engine
    steps = lengths.longest_of(setting.completions)
    if each > setting.slots:
        steps = max(steps, (each / setting.slots - 1) * lengths.mean + lengths.longest_of(setting.slots))
    return engine.base * steps + _of_tokens(costs, each)


def expected_training(costs: Costs) -> float:
    """Return seconds of training on one batch."""
    setting = costs.setting
    lengths, prompt = setting.lengths, setting.prompt_tokens
    longest = prompt + lengths.longest_of(setting.completions)
    if setting.pads:
        return costs.training(share_of(setting) * longest, longest)
    mean = prompt + lengths.mean
    square = prompt**2 + 2 * prompt * lengths.mean + lengths.mean_square
    return costs.training(max(setting.completions * mean / setting.trainer_gpus, longest), square / mean)


def _asynchronous(costs: Costs, training: float) -> Prediction:
    setting = costs.setting
    batch, tokens = setting.completions, setting.completions * setting.lengths.mean
    if not setting.max_staleness:  # nothing may be generated while the trainer works
        generation = expected_generation(costs)
        step = generation + training + costs.sync
        return Prediction(
            step_s=step, generation_s=generation, training_s=training, sync_s=costs.sync, tokens_per_s=tokens / step,
            engines_busy=min(1.0, _busy(costs) / (setting.engines * step)), trainer_busy=training / step,
        )  # fmt: skip
    trainer = training + costs.sync

    def engines(step: float) -> tuple[float, float]:
        """Return (seconds in which they make a batch that is not too old, share of it that is) for steps so long."""
        # (bound + 1) batches are on their way while the trainer waits, one less while it trains. A group is on its way
        # until its longest is done, its other completions only as long as they last.
        pending = (setting.max_staleness + 1 - min(1.0, trainer / step)) * batch
        in_flight = pending * setting.lengths.mean / setting.lengths.longest_of(setting.generations)
        rate, token_s = _saturated(costs, in_flight)
        queued = max(0.0, in_flight / setting.engines / setting.slots - 1) * setting.lengths.mean
        kept = _young_enough(costs, step / token_s, queued)
        return tokens / rate / kept + costs.pause, 1 - kept

    # The longer a step, the more is on its way and the less is too old: there is one length that fits.
    low, high = trainer, trainer
    while engines(high)[0] > high:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if engines(middle)[0] > middle else (low, middle)
    step, (generation, dropped) = high, engines(high)
    return Prediction(
        step_s=step, generation_s=generation, training_s=training, sync_s=costs.sync, tokens_per_s=tokens / step,
        engines_busy=min(1.0, generation / step), trainer_busy=training / step,
        staleness=float(setting.max_staleness), dropped=dropped,
    )  # fmt: skip


def _saturated(costs: Costs, in_flight: float) -> tuple[float, float]:
    """Return (tokens per second of all engines, seconds for each token of one completion) with so many in flight."""
    setting, engine, lengths = costs.setting, costs.engine, costs.setting.lengths
    at_once = min(float(setting.slots), in_flight / setting.engines)
    # A group stays on one engine, so with fewer groups than engines some have nothing.
    group = setting.generations * lengths.mean / lengths.longest_of(setting.generations)
    running = max(min(group, float(setting.slots)), at_once)
    context = setting.prompt_tokens + lengths.mean_square / (2 * lengths.mean)
    prompt = setting.prompt_tokens * engine.prefill / setting.generations / lengths.mean
    token_s = engine.step(running, running * context) + running * prompt
    return setting.engines * at_once / token_s, token_s


def _young_enough(costs: Costs, step: float, queued: float) -> float:
    """Return the share of groups that are done before the trainer has made more than `max_staleness` steps.

    Args:
        costs: of the setting.
        step: tokens that a completion gets in one step of the trainer.
        queued: tokens that it would have got while it waited for a slot.
    """
    setting = costs.setting
    # A group that starts right after a step has almost a whole one more than one that starts right before the next.
    starts = [(at + 0.5) / _STARTS for at in range(_STARTS)]
    # However long the queue is, the bound on what is on its way lets a group through that is no longer than most.
    least = setting.lengths.longest_of(setting.generations)
    tokens = [max(least, (setting.max_staleness + start) * step - queued) for start in starts]
    young = [setting.lengths.below(most) ** setting.generations for most in tokens]
    return max(sum(young) / _STARTS, _LEAST)


def _of_tokens(costs: Costs, completions: float) -> float:
    """Seconds that tokens of so many completions add to one engine's steps, and their prompts."""
    setting, engine, lengths = costs.setting, costs.engine, costs.setting.lengths
    context = setting.prompt_tokens * lengths.mean + lengths.mean_square / 2
    prompts = completions / setting.generations * setting.prompt_tokens
    return engine.each * completions * lengths.mean + engine.seen * completions * context + engine.prefill * prompts


def _busy(costs: Costs) -> float:
    """Seconds that all engines decode in a synchronous step, added up."""
    setting = costs.setting
    most = min(setting.engines, -(-setting.completions // setting.piece))
    each = setting.completions / most
    alone = max(1, round(each))
    queued = max(0.0, each / setting.slots - 1) * setting.lengths.mean
    steps = setting.lengths.longest_of(min(alone, setting.slots)) + queued
    return most * (costs.engine.base * steps + _of_tokens(costs, each))
