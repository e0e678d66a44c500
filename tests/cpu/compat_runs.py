"""What notebooks pass that TRL or transformers took away, with the TRL release that can be imported.

    python -m tests.cpu.compat_runs OUT.json early|late

In a process of its own; `early` imports TRL before `PatchFastRL`.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import argparse
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trlpatch
from tests import stock
from trlpatch.trl_names import CORRECTION, CORRECTION_LEFT_OUT

COMMON = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
LIMIT = 3
CONFIGS = ("SFTConfig", "DPOConfig", "GRPOConfig", "RLOOConfig")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("imported", choices=("early", "late"))
    arguments = parser.parse_args()
    if arguments.imported == "early":
        stock.hide_vllm()
        stock.import_package_table()
        import trl

        _ = [getattr(trl, name, None) for name in (*CONFIGS, "SFTTrainer", "GRPOTrainer")]
    trlpatch.PatchFastRL(compat="on")
    with tempfile.TemporaryDirectory() as place:
        report = look(Path(place))
    trlpatch.unpatch()
    report["undone"] = refused()
    trlpatch.PatchFastRL()
    report["off"] = refused()
    arguments.out.write_text(json.dumps(report, indent=1))


def look(place: Path) -> dict[str, Any]:
    import trl
    from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

    configs = [TrainingArguments, *(getattr(trl, name) for name in CONFIGS)]
    # The class attribute of a field of upstream's is its default, 0.0.
    report: dict[str, Any] = {"has_warmup_ratio": TrainingArguments.warmup_ratio is not None}
    report["warmup"] = {
        cls.__name__: [cls(**COMMON, **given).get_warmup_steps(1000) for given in WARMUPS]
        for cls in configs
        if cls.__name__ != "RLOOConfig" or "num_generations" in cls.__dataclass_fields__
    }
    made = trl.GRPOConfig(**COMMON, max_prompt_length=64, per_device_train_batch_size=1, num_generations=6)
    given = {"output_dir": "o", "use_cpu": "true", "bf16": "false", "max_prompt_length": "64", "warmup_ratio": "0.1"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    parsed = HfArgumentParser((trl.GRPOConfig,)).parse_args_into_dataclasses(words)[0]
    report["limits"] = {
        "built": made.max_prompt_length,
        "pickled": pickle.loads(pickle.dumps(made)).max_prompt_length,
        "parsed": parsed.max_prompt_length,
        "saved": json.loads(made.to_json_string())["max_prompt_length"],
    }
    report["parsed_warmup"] = parsed.get_warmup_steps(1000)
    report["left_out"] = [CORRECTION_LEFT_OUT in vars(one) for one in (made, parsed)]
    report["has_correction"] = hasattr(made, CORRECTION)
    report["batch"] = [made.per_device_train_batch_size, made.generation_batch_size]
    tiny.checkpoint(place)
    tokenizer, model = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(place)
    stock.supply_warnings_issued(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=True)
    report["ids"] = ids == tokenizer("one")["input_ids"]
    tokenizer.chat_template = None
    sft = trl.SFTTrainer(
        model,
        tokenizer=tokenizer,
        args=trl.SFTConfig(**{**COMMON, "output_dir": str(place / "sft")}),
        train_dataset=tiny.dataset(4).rename_column("prompt", "words"),
        dataset_text_field="words",
        max_seq_length=33,
    )
    report["sft_fields"] = [sft.args.max_length, sft.args.dataset_text_field]
    config = {**COMMON, "output_dir": str(place / "grpo"), "max_steps": 1, "save_strategy": "no", "use_vllm": False}
    grpo = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        tokenizer=tokenizer,
        args=trl.GRPOConfig(
            **config,
            max_prompt_length=LIMIT,
            max_completion_length=4,
            num_generations=2,
            per_device_train_batch_size=1,
        ),
        train_dataset=tiny.dataset(4),
    )
    report["tokenizer"] = {type(trainer).__name__: trainer.processing_class is tokenizer for trainer in (sft, grpo)}
    report["generated_from"] = generated_from(grpo)
    full = [tokenizer(text)["input_ids"] for text in tiny.dataset(4)["prompt"]]
    assert all(len(one) > LIMIT for one in full)
    report["cut_prompts"] = [one[-LIMIT:] for one in full]
    return report


WARMUPS: tuple[dict[str, Any], ...] = (
    {"warmup_ratio": 0.1},
    {"warmup_ratio": 1.0},
    {"warmup_ratio": 0.1, "warmup_steps": 7},
)


def generated_from(trainer: Any) -> list[list[int]]:
    """Train, and return the prompts that `generate` was asked to complete."""
    seen: list[list[int]] = []
    own = trainer.model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        given = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.extend(given.tolist())
        return own(*args, **kwargs)

    trainer.model.generate = generate
    trainer.train()
    return seen


def refused() -> dict[str, list[str]]:
    """Return the notes on the errors of today."""
    import trl

    def notes(call: Callable[[], object]) -> list[str]:
        try:
            call()
        except TypeError as error:
            return getattr(error, "__notes__", [])
        return ["accepted"]

    return {
        "warmup_ratio": notes(lambda: trl.SFTConfig(**COMMON, warmup_ratio=0.1)),
        "tokenizer": notes(lambda: trl.SFTTrainer("model", tokenizer=1)),
    }


if __name__ == "__main__":
    main()
