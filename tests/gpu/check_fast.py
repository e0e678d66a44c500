"""Thirty real GRPO steps on a FastLanguageModel: is the policy in every rollout, and does it learn?

    python tests/gpu/check_fast.py --trl-root DIR --out fast.json 1.16.0 0.27.2 [--gpus 4]

For each TRL release, one process with one engine (CUDA graphs on), and in it five trainings on fresh adapters: on base
weights shared with the engine, with sleep and without, and a control in which requests are left out; then on a model
with base weights of its own, with sleep and without. The model has the layers of Qwen2.5-0.5B with random weights; the
reward, the share of odd token ids, starts at a half.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import ports
from tests.gpu.common import (
    DRIFT,
    TOLERANCE,
    random_model,
    report,
    run_child,
    used_gib,
)
from tests.runs.case import TARGETS
from tests.runs.measure import odd_tokens, watch_rollouts
from tests.runs.trainers import PROMPTS

STEPS = 30
CONTROL_STEPS = 8
LEARNED = 0.1
"""By how much the mean reward of the last five steps must exceed that of the first five."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="+")
    parser.add_argument("--trl-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1, help="so many releases at once, each on a device of its own")
    parser.add_argument("--timeout", type=int, default=400, help="seconds a release")
    arguments = parser.parse_args()
    model = random_model("0.5b")
    columns = f"{'gap first':>10}{'gap last':>10}{'gap max':>10}  reward"
    print(f"{'TRL':8}{'weights, sleep':20}{'ok':6}{columns}", flush=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(arguments.gpus)))
    devices: queue.Queue[str] = queue.Queue()
    for device in visible.split(",")[: arguments.gpus]:
        devices.put(device)
    results = []

    def one(release: str) -> None:
        device = devices.get()
        try:
            trl = arguments.trl_root / release
            places = {"CUDA_VISIBLE_DEVICES": device, **ports.environment()}
            found = run_child(Path(__file__), [str(model)], trl=trl, timeout=arguments.timeout, **places)
        finally:
            devices.put(device)
        result = {"trl": release, **found}
        results.append(result)
        print("\n".join(rows(result)), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1))

    with ThreadPoolExecutor(arguments.gpus) as pool:
        list(pool.map(one, arguments.releases))
    return int(any("FAIL" in line for result in results for line in rows(result)))


def rows(result: dict[str, Any]) -> list[str]:
    head = f"{result['trl']:8}"
    if "error" in result:
        return [f"{head}{'':20}FAIL  {result['error'][-600:]}"]
    lines = [f"{head}{name:20}{verdict(name, run):6}{numbers(run)}" for name, run in result["runs"].items()]
    return [*lines, *(f"{head}{line}" for line in result["about"])]


def verdict(name: str, run: dict[str, Any]) -> str:
    if name == "control":
        return "PASS" if run["gaps"][-1] > DRIFT else "FAIL"
    learned = mean(run["rewards"][-5:]) - mean(run["rewards"][:5]) > LEARNED
    return "PASS" if max(run["gaps"]) < TOLERANCE and learned and len(run["gaps"]) == STEPS else "FAIL"


def numbers(run: dict[str, Any]) -> str:
    gaps, rewards = run["gaps"], run["rewards"]
    text = f"{gaps[0]:10.4f}{gaps[-1]:10.4f}{max(gaps):10.4f}  {mean(rewards[:5]):.2f} -> {mean(rewards[-5:]):.2f}"
    return f"{text}, {len(gaps)} rollouts, {run['seconds']:.0f} s, {run['memory']:.1f} GiB at the optimizer"


# In the child.


def child(model: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import trlpatch
    from trlpatch import FastLanguageModel
    from trlpatch.engine.attach import detach_engine
    from trlpatch.engine.describe import describe_engines

    started = time.monotonic()
    trlpatch.PatchFastRL("grpo")
    base, words = FastLanguageModel.from_pretrained(
        model,
        max_seq_length=128,
        load_in_4bit=False,
        gpu_memory_utilization=0.15,
        max_lora_rank=16,
        enable_sleep_mode=True,
        share_weights=True,
        max_num_seqs=32,
        compilation_config={"cudagraph_capture_sizes": [1, 8, 16, 32]},
    )
    engine = base.vllm_engine
    about = [f"loaded in {time.monotonic() - started:.0f} s"]
    runs = {
        "shared, on": run(base, words, "on"),
        "shared, off": run(base, words, "off"),
        "control": run(base, words, "on", control=True),
    }
    about += describe_engines()
    detach_engine(base)
    del base
    separate = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": 0})
    trlpatch.attach_engine(separate, engine)
    runs |= {"separate, on": run(separate, words, "on"), "separate, off": run(separate, words, "off")}
    return {"runs": runs, "about": [*about, *describe_engines()]}


def run(base: Any, words: Any, sleep: str, *, control: bool = False) -> dict[str, Any]:
    """One training on a fresh adapter, which is taken off the base again afterwards."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    import trlpatch
    import trlpatch.hooks

    memory: list[float] = []

    class Memory(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            memory.append(used_gib())

    started = time.monotonic()
    trlpatch.PatchFastRL("grpo", sleep="on" if sleep == "on" else "off")
    policy = trlpatch.FastLanguageModel.get_peft_model(
        base, r=16, lora_alpha=32, target_modules=TARGETS, use_gradient_checkpointing=False
    )
    live = trlpatch.hooks.lora_request
    if control:
        # The hook also wakes the engine; only what it returns is left out.
        trlpatch.hooks.lora_request = lambda *given: live(*given) and None
    trainer = trl.GRPOTrainer(
        model=policy,
        args=config(trl.GRPOConfig, CONTROL_STEPS if control else STEPS),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=words,
        reward_funcs=odd_tokens,
        callbacks=[Memory()],
    )
    gaps: list[float] = []
    stop = watch_rollouts(trainer, policy.vllm_engine, gaps)
    trainer.train()
    stop()
    trlpatch.hooks.lora_request = live
    policy.vllm_engine.wake_up()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    policy.unload()
    torch.cuda.empty_cache()
    return {"gaps": gaps, "rewards": rewards, "seconds": time.monotonic() - started, "memory": max(memory)}


def config(cls: Any, steps: int) -> Any:
    settings = {
        "output_dir": "/tmp/trlpatch-gpu-out", "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "num_generations": 8, "max_completion_length": 24, "max_prompt_length": 64, "max_steps": steps,
        "learning_rate": 2e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 0, "report_to": [],
        "save_strategy": "no", "bf16": True, "gradient_checkpointing": False, "disable_tqdm": True, "beta": 0.0,
        "temperature": 1.0, "vllm_importance_sampling_correction": False,
    }  # fmt: skip
    known = cls.__dataclass_fields__
    return cls(**{name: value for name, value in settings.items() if name in known})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        report(child(*sys.argv[2:]))
    else:
        sys.exit(main())
