"""What the worker takes from AsyncGRPOConfig and from the engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trlpatch.errors import AsyncNotSupported
from trlpatch.log import logger

# AsyncGRPOConfig has those of 1.6 only `temperature` and `max_completion_length`.
_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
"""Arguments of AsyncGRPOConfig that not every release has, and what TRL's own worker asks for without them."""


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are made.

    Attributes:
        num_generations: completions of a prompt.
        max_staleness: a sample that lags more weight updates than this is dropped.
        capacity: samples that may be under way or wait to be trained on, at once.
        micro_batch: samples that the trainer takes at once, of all ranks; None when it batches by tokens.
        sampling: arguments of `vllm.SamplingParams`.
    """

    num_generations: int
    max_staleness: int
    capacity: int
    micro_batch: int | None
    sampling: Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_completions: bool = False
    num_completions_to_print: int | None = None

    @property
    def groups(self) -> int:
        """How many prompts may be under way or wait, at once."""
        return max(1, self.capacity // self.num_generations)


def rollout_settings(args: Any, sampling: Mapping[str, Any] | None = None) -> RolloutSettings:
    """Read an AsyncGRPOConfig; `sampling` are arguments of `vllm.SamplingParams` that count more than its own.

    What may be under way is bounded as TRL bounds it, `max_inflight_tasks`, by default `max_staleness` steps' worth of
    samples: what is more would be stale when its turn comes. Samples that wait to be trained on count as well.
    """
    per_micro_batch = int(args.per_device_train_batch_size) * int(args.world_size)
    per_step = per_micro_batch * int(args.gradient_accumulation_steps)
    capacity = int(getattr(args, "max_inflight_tasks", -1))
    if capacity <= 0:
        capacity = max(int(args.max_staleness), 1) * per_step
    queued = int(getattr(args, "queue_maxsize", 0))
    if queued > 0:
        capacity = min(capacity, queued)
    budget = getattr(args, "token_budget", -1)
    by_count = budget is not None and budget <= 0
    asked: dict[str, Any] = {name: getattr(args, name, default) for name, default in _SAMPLING.items()}
    asked = {name: value for name, value in asked.items() if value is not None}
    asked |= {"temperature": args.temperature, "max_tokens": args.max_completion_length, **(sampling or {})}
    asked |= {"n": int(args.num_generations), "logprobs": 0}
    return RolloutSettings(
        num_generations=int(args.num_generations),
        max_staleness=int(args.max_staleness),
        capacity=capacity,
        micro_batch=per_micro_batch if by_count or not hasattr(args, "token_budget") else None,
        sampling=asked,
        chat_template_kwargs=dict(args.chat_template_kwargs or {}),
        log_completions=bool(args.log_completions),
        num_completions_to_print=args.num_completions_to_print,
    )


def check_engines(infos: Any, args: Any) -> None:
    """See that what the engines sample can be trained on.

    Raises:
        AsyncNotSupported: their log-probabilities are not those of the temperature that is sampled with.
    """
    for info in infos:
        mode = getattr(info.vllm_config.model_config, "logprobs_mode", "raw_logprobs")
        if float(args.temperature) != 1.0 and not str(mode).startswith("processed"):
            raise AsyncNotSupported(
                f"rollout engine {info.index} has logprobs_mode={str(mode)!r}, and temperature={args.temperature}: "
                "AsyncGRPOTrainer compares with log-probabilities at that temperature, expected 'processed_logprobs'; "
                "`create_engines(..., logprobs_mode='processed_logprobs')`"
            )


def longest(infos: Any) -> int:
    """The most tokens that prompt and completion can have: what TRL asks its server for, as `token_budget`."""
    return min(int(info.vllm_config.model_config.max_model_len) for info in infos)


def warn_of_large_groups(settings: RolloutSettings, args: Any) -> None:
    """Say so when the samples of one prompt cannot all be trained on before they are stale."""
    per_step = int(args.per_device_train_batch_size) * int(args.world_size) * int(args.gradient_accumulation_steps)
    in_time = per_step * int(args.weight_sync_steps) * (settings.max_staleness + 1)
    if settings.micro_batch is not None and settings.num_generations > in_time:
        logger.warning(
            "num_generations=%d, and at most %d samples are trained on before one is stale (a step takes %d, "
            "weight_sync_steps=%d, max_staleness=%d): the rest of every prompt's is dropped; raise "
            "gradient_accumulation_steps or max_staleness",
            settings.num_generations, in_time, per_step, args.weight_sync_steps, settings.max_staleness,
        )  # fmt: skip
