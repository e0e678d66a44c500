"""Rewards and advantages of one group of completions, as TRL's own AsyncRolloutWorker defines them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trlpatch.errors import RolloutWorkerFailed
from trlpatch.ray.async_grpo.prompts import Prompt
from trlpatch.ray.async_grpo.threads import in_thread

RewardFunction = Callable[..., Any]
"""Called with lists of one entry per completion; returns, or awaits, a list of floats or None."""

_NOT_COLUMNS = {"prompt", "completion", "completion_ids"}
_LEAST_SPREAD = 1e-8
"""TRL's: what is added to the standard deviation of a group."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    content: Any
    """What reward functions get: messages for a conversational prompt, text for another."""
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Of the sampled tokens, as the sampler had them."""


@dataclass(frozen=True)
class Group:
    """All completions of one prompt."""

    prompt: Prompt
    prompt_ids: Sequence[int]
    completions: Sequence[Completion]
    model_version: int
    """Of the policy that sampled the first token."""
    mixed: bool = False
    """Was the policy updated while these were sampled?"""
    seconds: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Rewards of a group: one entry per completion; NaN where no function had an opinion."""

    rewards: Sequence[float]
    advantages: Sequence[float]
    by_function: Mapping[str, Sequence[float]] = field(default_factory=dict)
    mean: float = math.nan
    std: float = math.nan

    def metrics(self, index: int) -> dict[str, float]:
        """What the trainer logs of one completion, under TRL's names."""
        named = {f"rewards/{name}": values[index] for name, values in self.by_function.items()}
        return {"reward": self.rewards[index], "reward_std": self.std, **named}


async def score(group: Group, functions: Sequence[RewardFunction]) -> Scores:
    """Call every reward function with the group, all at once: coroutines here, the others in threads.

    Raises:
        RolloutWorkerFailed: a function returned another number of rewards than there are completions.
        Whatever a function raises.
    """
    size = len(group.completions)
    row = group.prompt.row
    arguments = {
        "prompts": [row["prompt"]] * size,
        "completions": [completion.content for completion in group.completions],
        "completion_ids": [list(completion.token_ids) for completion in group.completions],
        **{name: [value] * size for name, value in row.items() if name not in _NOT_COLUMNS},
    }
    answers = await asyncio.gather(*[_call(function, arguments) for function in functions])
    rows = [_checked(function, answer, size) for function, answer in zip(functions, answers, strict=True)]
    names = _names(functions)
    return scores(dict(zip(names, rows, strict=True)), size)


def scores(by_function: Mapping[str, Sequence[float]], size: int) -> Scores:
    """Sum the rewards and normalise them over the group: (reward - mean) / (population std + 1e-8).

    A NaN of one function is left out of the sum; a completion that has nothing but NaN takes no part in mean and std,
    and its advantage is 0.
    """
    import numpy

    columns = numpy.array(list(by_function.values()), dtype=float).reshape(len(by_function), size)
    absent = numpy.isnan(columns).all(axis=0)
    totals = numpy.where(absent, numpy.nan, numpy.nansum(columns, axis=0))
    advantages = numpy.zeros(size)
    mean = std = math.nan
    if not absent.all():
        present = totals[~absent]
        mean, std = float(present.mean()), float(present.std())
        advantages[~absent] = (present - present.mean()) / (present.std() + _LEAST_SPREAD)
    return Scores(totals.tolist(), advantages.tolist(), by_function, mean, std)


def name_of(function: RewardFunction) -> str:
    """The name that TRL logs the rewards of this function under."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name, again = name_of(function), 1
        while name in names:  # two lambdas
            again += 1
            name = f"{name_of(function)}_{again}"
        names.append(name)
    return names


async def _call(function: RewardFunction, arguments: Mapping[str, Any]) -> Any:
    if _is_async(function):
        return await function(**arguments)
    answer = await in_thread(function, **arguments)
    return await answer if isinstance(answer, Awaitable) else answer


def _is_async(function: RewardFunction) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _checked(function: RewardFunction, answer: Any, size: int) -> list[float]:
    rewards = [math.nan if reward is None else float(reward) for reward in answer]
    if len(rewards) != size:
        raise RolloutWorkerFailed(
            f"reward function {name_of(function)}: expected {size} rewards, one for each completion, found "
            f"{len(rewards)}"
        )
    return rewards
