"""On-policy check: does the training forward compute the log-probabilities that TRL's extra pass would?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

# Between them, these make a batch and its loss. A subclass that has its own may read what would be absent.
_METHODS = (
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "compute_loss",
    "_compute_loss",
)

# What transformers' models and configs call randomness that only train mode has. `disable_dropout` turns off
# nn.Dropout modules, but attention takes its probability as a float: Qwen2Attention.attention_dropout.
_RANDOM = re.compile(r"drop(out|_path|_prob|_rate|layer)|layerdrop|pdrop|jitter|noise")


def reason_against(trainer: Any) -> str:
    """Say why the extra pass has to run for this trainer as it is now; empty if nothing speaks for it.

    Every part of the answer is the same on all ranks: the pass is a collective operation where parameters are sharded.
    """
    return _updates_between(trainer) or _needed_earlier(trainer) or _overridden(trainer) or _random(trainer)


def _updates_between(trainer: Any) -> str:
    args = trainer.args
    generates_every = args.steps_per_generation * trainer.num_iterations
    if args.gradient_accumulation_steps % generates_every == 0:
        return ""
    return (
        "weights are updated while a batch is in use: "
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}, "
        f"steps_per_generation={args.steps_per_generation}, num_iterations={trainer.num_iterations}"
    )


def _needed_earlier(trainer: Any) -> str:
    if trainer.beta != 0.0 and "RLOOTrainer" in _names(trainer):
        return f"beta={trainer.beta}: RLOO subtracts the KL divergence, made of old log-probabilities, from rewards"
    liger = any(getattr(trainer.args, name, False) for name in ("use_liger_kernel", "use_liger_loss"))
    if liger and hasattr(trainer, "compute_liger_loss"):
        return "use_liger_kernel: Liger's loss does not give its log-probabilities away (TRL below 1.14)"
    return ""


def _names(trainer: Any) -> set[str]:
    return {cls.__name__ for cls in type(trainer).__mro__}


def _overridden(trainer: Any) -> str:
    cls = type(trainer)
    own = next((c for c in cls.__mro__ if c.__name__ in ("GRPOTrainer", "RLOOTrainer") and _is_trl(c)), None)
    if own is None:
        return f"{cls.__name__} is made from neither TRL's GRPOTrainer nor its RLOOTrainer"
    for name in _METHODS:
        found = own.__dict__.get(name)
        if getattr(found, "__module__", None) != own.__module__:
            return f"{own.__name__}.{name} is not TRL's own"
        if name in vars(trainer) or getattr(cls, name) is not found:
            return f"{cls.__name__} overrides {name}"
    return ""


def _is_trl(cls: type) -> bool:
    return cls.__module__.startswith("trl.")


def _random(trainer: Any) -> str:
    noise = getattr(trainer.args, "neftune_noise_alpha", None)
    if noise:
        return f"random in train mode: neftune_noise_alpha={noise}"
    found = next(_random_parts(trainer.model), "")
    return f"random in train mode: {found}" if found else ""


def _random_parts(model: Any) -> Iterator[str]:
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            if module.p and module.training:
                yield f"{name} ({type(module).__name__}, p={module.p})"
        else:
            yield from _random_values(vars(module), name or type(module).__name__)
    yield from _random_settings(getattr(model, "config", None))


def _random_settings(config: Any) -> Iterator[str]:
    """Yield settings of a configuration and of those inside it (`text_config`)."""
    if config is None or not hasattr(config, "__dict__"):
        return
    yield from _random_values(vars(config), type(config).__name__)
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _random_settings(value)


def _random_values(values: dict[str, Any], owner: str) -> Iterator[str]:
    for name, value in values.items():
        if _names_randomness(name):
            # PEFT keeps some of its probabilities by adapter: LoHaLayer.rank_dropout.
            numbers = value.values() if type(value) is dict else [value]
            if any(type(number) in (int, float) and number > 0 for number in numbers):
                yield f"{owner}.{name}={value}"


@cache  # thousands of modules have the same few attributes, and every generation looks at them
def _names_randomness(attribute: str) -> bool:
    return _RANDOM.search(attribute) is not None
