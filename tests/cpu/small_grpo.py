"""A GRPO trainer for runs of a few steps, and the score of what an engine generated for it."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from pathlib import Path
from typing import Any

from tests.cpu.training import MAX_COMPLETION, configured, odd_tokens

GENERATIONS = 4


def small_grpo(
    model: Any, directory: Path, *, kind: str = "GRPO", config: dict[str, Any] | None = None, **given: Any
) -> Any:
    """Build one for three steps of eight completions.

    `kind` is GRPO or RLOO, whose trainers take the same. `config` goes into its config, where this release has the
    field; `given` are the trainer's own arguments.
    """
    import transformers
    import trl

    settings: dict[str, Any] = {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": 2 * GENERATIONS,
        "num_generations": GENERATIONS,
        "max_completion_length": MAX_COMPLETION,
        "max_steps": 3,
        **(config or {}),
    }
    arguments: dict[str, Any] = {
        "reward_funcs": odd_tokens,
        "train_dataset": tiny.dataset(32),
        "processing_class": tiny.tokenizer(),
        **given,
    }
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=configured(getattr(trl, f"{kind}Config"), settings),
        **arguments,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def gap(model: Any, output: Any) -> float:
    """Return the largest difference of a token's log-probability between the engine and the training model."""
    scored = tiny.trainer_logprobs(model, output.prompt_token_ids, output.outputs[0].token_ids)
    return float((tiny.engine_logprobs(output) - scored).abs().max())


def adapter_of(output: Any) -> str | None:
    """Return the name of the adapter that a completion was sampled with; None for the base model."""
    return None if output.lora_request is None else str(output.lora_request.lora_name)
