"""What TRL and transformers took away, as data: who had it, since when it is gone, and what to write instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["move", "switch", "keep", "special", "drop", "explain"]


@dataclass(frozen=True)
class Removed:
    """An argument that upstream had.

    Attributes:
        owners: names of the classes that had it. A config inherits from `TrainingArguments`.
        since: the release without it, with the pull request where that is known.
        instead: what to write.
        action: what compat="on" does. "move" gives the value to the field `to`; "switch" sets `to` to `value` where
            the argument is True; "keep" adds the field and does what it did; "special" is a function of
            `trlpatch.runtime.compat.configs`; "drop" takes it without effect, which is what it last had; "explain"
            leaves the error of upstream, with a note.
        kind: the type of the value, for command lines.
    """

    name: str
    owners: tuple[str, ...]
    since: str
    instead: str
    action: Action = "explain"
    kind: Any = str
    to: str = ""
    value: Any = None


_ARGS = ("TrainingArguments",)
_ROLLOUTS = ("GRPOConfig", "RLOOConfig")
_TF5 = "transformers 5"


def _gone(name: str, instead: str) -> Removed:
    return Removed(name, _ARGS, _TF5, instead)


TABLE: tuple[Removed, ...] = (
    Removed(
        "warmup_ratio",
        _ARGS,
        f"{_TF5} (#41326)",
        "warmup_steps, a ratio below 1",
        "special",
        float,
    ),
    Removed(
        "evaluation_strategy", _ARGS, "transformers 4.46 (#30190)", "eval_strategy", "move", str, to="eval_strategy"
    ),
    Removed("overwrite_output_dir", _ARGS, f"{_TF5} (#41323)", "nothing: Trainer never read it", "drop", bool),
    Removed("logging_dir", _ARGS, _TF5, "the environment variable TENSORBOARD_LOGGING_DIR", "special", str),
    Removed(
        "group_by_length",
        _ARGS,
        _TF5,
        'train_sampling_strategy="group_by_length"',
        "switch",
        bool,
        to="train_sampling_strategy",
        value="group_by_length",
    ),
    Removed("adafactor", _ARGS, _TF5, 'optim="adafactor"', "switch", bool, to="optim", value="adafactor"),
    Removed("no_cuda", _ARGS, _TF5, "use_cpu", "switch", bool, to="use_cpu", value=True),
    Removed("save_safetensors", _ARGS, _TF5, "nothing: checkpoints are safetensors", "special", bool),
    Removed(
        "per_gpu_train_batch_size",
        _ARGS,
        _TF5,
        "per_device_train_batch_size",
        "move",
        int,
        to="per_device_train_batch_size",
    ),
    Removed(
        "per_gpu_eval_batch_size",
        _ARGS,
        _TF5,
        "per_device_eval_batch_size",
        "move",
        int,
        to="per_device_eval_batch_size",
    ),
    Removed("push_to_hub_token", _ARGS, _TF5, "hub_token", "move", str, to="hub_token"),
    Removed("push_to_hub_model_id", _ARGS, _TF5, "hub_model_id", "move", str, to="hub_model_id"),
    Removed("torchdynamo", _ARGS, _TF5, "torch_compile_backend", "move", str, to="torch_compile_backend"),
    Removed("include_inputs_for_metrics", _ARGS, _TF5, 'include_for_metrics=["inputs"]', "special", bool),
    Removed("use_mps_device", _ARGS, _TF5, "nothing: mps is used where it is there", "drop", bool),
    _gone("push_to_hub_organization", 'hub_model_id="organization/name"'),
    _gone("include_tokens_per_second", "include_num_input_tokens_seen"),
    *(
        _gone(name, "nothing: it is gone")
        for name in (
            "fp16_backend",
            "fp16_opt_level",
            "half_precision_backend",
            "jit_mode_eval",
            "mp_parameters",
            "past_index",
            "ray_scope",
            "tpu_metrics_debug",
            "tpu_num_cores",
            "use_legacy_prediction_loop",
        )
    ),
    *(_gone(name, "fsdp_config") for name in ("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap")),
    Removed(
        "max_prompt_length",
        _ROLLOUTS,
        "TRL 0.28 (GRPO) and 0.29 (RLOO, #5056), without effect since 0.26 and 0.27",
        "a dataset without longer prompts (dataset.filter)",
        "keep",
        int,
    ),
    Removed(
        "use_liger_loss",
        (*_ROLLOUTS, "DPOConfig", "KTOConfig"),
        "TRL 0.28",
        "use_liger_kernel",
        "move",
        bool,
        to="use_liger_kernel",
    ),
    Removed(
        "vllm_guided_decoding_regex",
        (*_ROLLOUTS, "OnlineDPOConfig"),
        "TRL 0.28 (OnlineDPO 0.27)",
        "vllm_structured_outputs_regex",
        "move",
        str,
        to="vllm_structured_outputs_regex",
    ),
    Removed(
        "wandb_log_unique_prompts", _ROLLOUTS, "TRL 0.27", "log_unique_prompts", "move", bool, to="log_unique_prompts"
    ),
    Removed("max_seq_length", ("SFTConfig",), "TRL 0.20", "max_length", "move", int, to="max_length"),
    Removed(
        "max_prompt_length",
        ("DPOConfig", "KTOConfig"),
        "TRL 0.29 (KTO 0.27)",
        "max_length, for prompt and completion together, or a filtered dataset",
    ),
    Removed(
        "max_completion_length",
        ("DPOConfig", "KTOConfig"),
        "TRL 0.29 (KTO 0.27)",
        "max_length, for prompt and completion together, or a filtered dataset",
    ),
    Removed("rpo_alpha", ("DPOConfig",), "TRL 0.29", 'loss_type=["sigmoid", "sft"] with loss_weights'),
    *(
        Removed(name, ("GRPOConfig",), "TRL 0.18", "nothing: a colocated engine is on the trainer's device")
        for name in ("vllm_device", "vllm_dtype")
    ),
    Removed("rloo_k", ("RLOOConfig",), "TRL 0.25", "num_generations"),
    Removed("kl_coef", ("RLOOConfig",), "TRL 0.25", "beta"),
    Removed("cliprange", ("RLOOConfig",), "TRL 0.25", "epsilon"),
    Removed("response_length", ("RLOOConfig",), "TRL 0.25", "max_completion_length"),
    Removed("num_ppo_epochs", ("RLOOConfig",), "TRL 0.25", "num_iterations"),
)
"""Configs. What this TRL and transformers still have is left to them."""

TOKENIZER = Removed(
    "tokenizer", ("Trainer",), "TRL 0.16 and transformers 5", "processing_class", "move", to="processing_class"
)

_OF_SFT = tuple(
    Removed(name, ("SFTTrainer",), "TRL 0.16", f"SFTConfig({to}=...)", "move", to=to)
    for name, to in {
        "dataset_text_field": "dataset_text_field",
        "max_seq_length": "max_length",
        "packing": "packing",
        "eval_packing": "eval_packing",
        "dataset_num_proc": "dataset_num_proc",
        "dataset_kwargs": "dataset_kwargs",
        "model_init_kwargs": "model_init_kwargs",
        "neftune_noise_alpha": "neftune_noise_alpha",
    }.items()
)
"""Arguments of SFTTrainer that are fields of its config."""

EVERY = (*TABLE, TOKENIZER, *_OF_SFT)
"""Configs' and trainers'."""


def known(cls: type) -> dict[str, Removed]:
    """Return what the classes that `cls` is made from had, by name; the nearest class's first."""
    found: dict[str, Removed] = {}
    for base in cls.__mro__:
        for one in EVERY:
            if base.__name__ in one.owners:
                found.setdefault(one.name, one)
    return found
