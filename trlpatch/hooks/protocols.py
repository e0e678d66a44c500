"""Declare what of TRL is touched: trainers, their arguments and `VLLMGeneration`, as types.

Names are TRL's own, 0.18 to 1.16. Fields that only some trainers or releases have are asked for with `getattr` where
they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase
    from transformers.training_args import ParallelMode


class TrainerArguments(Protocol):
    """`GRPOConfig` and its like: transformers' `TrainingArguments` with TRL's fields for vLLM."""

    use_vllm: bool
    vllm_mode: str
    """ "colocate" or "server" (TRL 0.18)."""
    vllm_enable_sleep_mode: bool
    """TRL 0.23."""

    @property
    def dataloader_num_workers(self) -> int:
        """Of transformers."""

    @property
    def process_index(self) -> int:
        """Of transformers: the rank of this process."""

    @property
    def parallel_mode(self) -> ParallelMode:
        """Of transformers."""


class Owner(Protocol):
    """Who owns an engine: the trainer below TRL 0.28, its `VLLMGeneration` since."""

    @property
    def model(self) -> Module:
        """The model in training, wrapped as accelerate has it."""


class TrainerLike(Owner, Protocol):
    """A trainer that may roll out on vLLM; its `__init__` may still be running."""

    @property
    def args(self) -> TrainerArguments:
        """Its configuration."""

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or a processor that has one as `tokenizer`."""


class GenerationLike(Owner, Protocol):
    """`trl.generation.vllm_generation.VLLMGeneration` (TRL 0.28): owns the engine of a trainer."""

    @property
    def mode(self) -> str:
        """ "colocate" or "server"."""

    def sync_weights(self) -> None:
        """Push every weight into the engine; the `adapter_sync` patch is in it."""


RolloutFunc = Callable[..., object]
"""A user's `rollout_func`."""
