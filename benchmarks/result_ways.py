"""The processes of result_arithmetic.py: supervised training, and GRPO of one way from what it left."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.arithmetic import accuracy, correct, save_mediocre_model
from benchmarks.engine_start import build_engines_with, keep_weights_as_they_are
from benchmarks.step_timers import Lines, settle
from benchmarks.step_ways import one_device
from tests.runs.case import TARGETS, versions

if TYPE_CHECKING:
    from benchmarks.result_arithmetic import Order

LOGGED = {
    "reward": "reward",
    "sampling/sampling_logp_difference/mean": "logp_difference",
    "sampling/importance_sampling_ratio/mean": "ratio",
    "sampling/importance_sampling_ratio/min": "ratio_min",
    "grad_norm": "grad_norm",
    "completions/mean_length": "completion_length",
}
"""What is kept of TRL's own log, and under which name."""

WARM = 10
"""Steps in which the learning rate rises: before Adam has seen some gradients its steps are all of one size."""

ENGINE_LENGTH = 64
"""Tokens of a sequence in the engine: above what a problem takes, and a multiple of every KV block."""


def supervised(order: Order, shape: str, until: float, seconds: float) -> None:
    """In the child: train the model that all ways start from."""
    import torch

    if not order.cuda:
        torch.set_num_threads(1)
    made = save_mediocre_model(
        Path(order.model), order.problems, shape=shape, until=until, seconds=seconds, cuda=order.cuda
    )
    (Path(order.model) / "supervised.json").write_text(json.dumps(asdict(made)) + "\n", encoding="utf-8")


def train(way: str, order: Order, lines: Lines) -> None:
    """In the child: train one way, and report to `lines`."""
    if way != "stock":
        import trlpatch

        trlpatch.PatchFastRL("grpo")
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    if not order.cuda:
        torch.set_num_threads(1)
        keep_weights_as_they_are()
        build_engines_with(enforce_eager=True)
    model, words = (_fast if way == "trlpatch" else _plain)(order)
    drawn = list(islice(order.problems.stream("grpo"), order.steps * order.prompts))
    batch = order.prompts * order.generations
    settings: dict[str, Any] = {
        "output_dir": str(Path(order.model).parent / f"{way}-out"), "per_device_train_batch_size": batch,
        "num_generations": order.generations, "max_completion_length": order.problems.answer_tokens,
        "max_steps": order.steps, "learning_rate": order.learning_rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": WARM,
        "logging_steps": 1, "seed": order.seed, "report_to": [], "save_strategy": "no", "bf16": order.cuda,
        "use_cpu": not order.cuda, "disable_tqdm": True, "gradient_checkpointing": False, "use_vllm": True,
        "vllm_mode": "colocate", "vllm_gpu_memory_utilization": order.utilization,
        "vllm_max_model_length": ENGINE_LENGTH,
    }  # fmt: skip
    config = GRPOConfig(**settings)
    one_device(config)
    trainer = GRPOTrainer(
        model=model, args=config, reward_funcs=correct, processing_class=words,
        train_dataset=Dataset.from_dict(
            {"prompt": [one.prompt for one in drawn], "answer": [one.answer for one in drawn]}
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_watch(order, words, lines))
    device = torch.cuda.get_device_name() if order.cuda else "CPU"
    lines.write("loaded", versions=versions(), device=device, status=_status(way))
    trainer.train()


def _status(way: str) -> str:
    if way == "stock":
        return ""
    import trlpatch

    return str(trlpatch.status())


def _plain(order: Order) -> tuple[Any, Any]:
    """Load the model with transformers and give it an adapter, as a user of stock TRL does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if order.cuda else torch.float32
    base = AutoModelForCausalLM.from_pretrained(order.model, dtype=dtype)
    lora = LoraConfig(r=order.rank, lora_alpha=2 * order.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    torch.manual_seed(order.seed)  # as get_peft_model(random_state=...) does
    return get_peft_model(base, lora), AutoTokenizer.from_pretrained(order.model)


def _fast(order: Order) -> tuple[Any, Any]:
    """Load the model with its engine, and give it the same adapter."""
    import trlpatch

    base, words = trlpatch.FastLanguageModel.from_pretrained(
        order.model, max_seq_length=ENGINE_LENGTH, load_in_4bit=False, max_lora_rank=order.rank,
        gpu_memory_utilization=order.utilization, enable_sleep_mode=False,
        max_num_seqs=order.prompts * order.generations,  # as TRL has it for its own engine
    )  # fmt: skip
    adapted = trlpatch.FastLanguageModel.get_peft_model(
        base, r=order.rank, lora_alpha=2 * order.rank, target_modules=TARGETS, use_gradient_checkpointing=False,
        random_state=order.seed,
    )  # fmt: skip
    return adapted, words


def _watch(order: Order, words: Any, lines: Lines) -> Any:
    from transformers import TrainerCallback

    held_out = order.problems.evaluated()

    class Watch(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            lines.write("accuracy", number=0, share=accuracy(model, words, held_out))
            settle()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            settle()
            at = state.global_step
            lines.write("step", number=at, seconds=time.perf_counter() - self.started)
            over = time.time() > order.ends
            if at % order.every == 0 or at == order.steps or over:
                lines.write("accuracy", number=at, share=accuracy(model, words, held_out))
            if over:
                control.should_training_stop = True
            settle()
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            kept = {ours: logs[theirs] for theirs, ours in LOGGED.items() if theirs in (logs or {})}
            if kept:
                lines.write("log", number=state.global_step, **kept)

    return Watch()
