"""The engine's share of a GRPO step on one GPU: weight hand-over, sleep, and memory; against stock TRL.

    python benchmarks/bench_engine.py --trl DIR/1.9.2 --out engine.json [--shape 7b] [--only shared,separate,stock]

One process per way, the same random-weight model in each, LoRA r=16 on all seven linear modules, CUDA graphs on:

    stock      TRL as it is: it builds the engine, merges, pushes all weights, unmerges; vllm_enable_sleep_mode=True
    separate   trlpatch, the engine and the trainer with base weights of their own
    shared     trlpatch, the trainer's base weights are the engine's
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.gpu.common import (
    milliseconds,
    random_model,
    report,
    run_child,
    set_adapter,
    used_gib,
)
from tests.runs.case import TARGETS
from tests.runs.measure import odd_tokens
from tests.runs.trainers import PROMPTS

WAYS = ("stock", "separate", "shared")
UTILIZATION = 0.35
STEPS = 4


def main() -> int:
    """Run each way in a process of its own; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="an unpacked TRL release, 1.0 or newer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--timeout", type=int, default=240, help="seconds a process")
    arguments = parser.parse_args()
    model, results = random_model(arguments.shape), {}
    for way in arguments.only.split(","):
        results[way] = run_child(
            Path(__file__), [str(model), way], trl=arguments.trl, timeout=arguments.timeout, PYTHONUNBUFFERED="1"
        )
        print(way, json.dumps(results[way], indent=1), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1))
    return int(any("error" in result for result in results.values()))


# In the child.


def child(model: str, way: str) -> dict[str, Any]:
    """Train for a few steps, then time the engine's parts one by one."""
    started = time.perf_counter()
    trainer = build(model, way)
    loaded = time.perf_counter() - started
    memory = Memory()
    trainer.add_callback(memory.callback())
    found: dict[str, Any] = {"load_s": round(loaded, 1), "used_after_load_gib": round(used_gib(), 1)}
    engine = trainer.vllm_generation.llm
    generating = timed_method(engine, "generate")
    trainer.train()
    found["step_s"] = [round(entry["step_time"], 2) for entry in trainer.state.log_history if "step_time" in entry]
    found["generate_s"] = [round(seconds, 2) for seconds in generating]
    found["used_at_optimizer_gib"] = [round(value, 1) for value in memory.used]
    found["peak_allocated_gib"] = [round(value, 1) for value in memory.peak]
    if way != "stock":
        from trlpatch.engine.describe import describe_engines

        found["engines"] = describe_engines()
    found |= hand_over(trainer, way)
    found |= sleeping(trainer, way)
    return found


def build(model: str, way: str) -> Any:
    """A trainer whose engine is up."""
    import torch

    settings: dict[str, Any] = {}
    if way == "stock":
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        words = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        policy = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
        settings = {"vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": UTILIZATION, "use_vllm": True,
                    "vllm_mode": "colocate", "vllm_max_model_length": 512}  # fmt: skip
    else:
        import trlpatch

        trlpatch.PatchFastRL("grpo", sleep="on")
        base, words = trlpatch.FastLanguageModel.from_pretrained(
            model, max_seq_length=512, load_in_4bit=False, gpu_memory_utilization=UTILIZATION, max_lora_rank=16,
            enable_sleep_mode=True, share_weights=way == "shared",
        )  # fmt: skip
        policy = trlpatch.FastLanguageModel.get_peft_model(base, r=16, lora_alpha=16, target_modules=TARGETS)
    import trl
    from datasets import Dataset

    arguments = trl.GRPOConfig(
        output_dir="/tmp/trlpatch-gpu-out", per_device_train_batch_size=16, gradient_accumulation_steps=4,
        num_generations=8, max_completion_length=256, max_steps=STEPS, learning_rate=1e-5, logging_steps=1, seed=0,
        report_to=[], save_strategy="no", bf16=True, gradient_checkpointing=True, disable_tqdm=True, beta=0.0,
        **settings,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=policy, args=arguments, train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=words,
        reward_funcs=odd_tokens,
    )  # fmt: skip


class Memory:
    """GiB in use, and allocated by torch at most, when the optimizer steps."""

    def __init__(self) -> None:
        self.used: list[float] = []
        self.peak: list[float] = []

    def callback(self) -> Any:
        """Make the transformers callback that fills the lists."""
        import torch
        from transformers import TrainerCallback

        memory = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                memory.used.append(used_gib())
                memory.peak.append(torch.cuda.max_memory_allocated() / 2**30)

        return Callback()


def hand_over(trainer: Any, way: str) -> dict[str, Any]:
    """Milliseconds from a changed adapter to an engine that has it, by TRL's own entrance to it."""
    owner = trainer.vllm_generation
    seeds = itertools.count()

    def change() -> None:
        set_adapter(trainer.model, seed=next(seeds))

    sync = timer(owner.sync_weights, change, repeats=12)
    found = {"sync_ms": sync}
    if way != "stock":
        from trlpatch.engine.publisher import Registration
        from trlpatch.engine.state import state_of
        from trlpatch.hooks import lora_request

        found["lora_request_ms"] = timer(lambda: lora_request(owner, owner.llm), lambda: None, repeats=12)
        state = state_of(owner.llm)
        state.adapter_sync, state.published = Registration(owner.llm), None
        found["registered_anew_ms"] = timer(owner.sync_weights, lambda: set_adapter(trainer.model, seed=1), repeats=8)
        state.adapter_sync = state.published = None
    return found


def sleeping(trainer: Any, way: str) -> dict[str, Any]:
    """Milliseconds of a sleep and of the wake after it, GiB freed; the first of each kind apart."""
    import torch

    owner, slept, woken, freed = trainer.vllm_generation, [], [], []
    torch.cuda.empty_cache()
    if way == "stock":
        llm = owner.llm
        rounds: list[Callable[[], Any]] = [lambda: llm.sleep(level=2), lambda: llm.wake_up()]
        # The sync woke the weights; below 0.28, wake_up() without tags would map them a second time.
        llm.wake_up(tags=["kv_cache"])
    else:
        from trlpatch.hooks import sleep, wake_up

        rounds = [lambda: sleep(owner, owner.llm, level=2), lambda: wake_up(owner, owner.llm)]
        rounds[1]()
    for _ in range(6):
        before = used_gib()
        slept.append(round(milliseconds(rounds[0]), 3))
        freed.append(before - used_gib())
        woken.append(round(milliseconds(rounds[1]), 3))
    return {
        "sleep_first_ms": slept[0], "sleep_ms": round(median(slept[1:]), 1), "wake_ms": round(median(woken[1:]), 1),
        "freed_gib": round(median(freed), 1),
    }  # fmt: skip


def timer(call: Callable[[], Any], before: Callable[[], Any], *, repeats: int) -> dict[str, float]:
    """Milliseconds of `call`, each after an untimed `before`; the first two stay out of the median."""
    found = []
    for _ in range(repeats):
        before()
        found.append(round(milliseconds(call), 3))
    return {"first": found[0], "median": round(median(found[2:]), 3), "worst": max(found[2:])}


def timed_method(owner: Any, name: str) -> list[float]:
    """Seconds of each call of `owner.name` from now on."""
    method, found = getattr(owner, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            found.append(time.perf_counter() - started)

    setattr(owner, name, timed)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        report(child(*sys.argv[2:]))
    else:
        sys.exit(main())
