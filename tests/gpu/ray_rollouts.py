"""GRPO on this process's GPU with vLLM engines on the others, measured: `test_ray_rollouts.py` judges it.

    python tests/gpu/ray_rollouts.py --child MODEL ENGINES TENSOR_PARALLEL

Not run on a GPU yet. With the TRL release that can be imported.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.common import report, set_adapter
from tests.runs.case import TARGETS
from tests.runs.measure import gap, odd_tokens
from tests.runs.trainers import PROMPTS

STEPS = 4
UPDATES = 10


def measure(directory: str, engines: int, parallel: int) -> dict[str, Any]:
    """Gaps of a training, and of one without adapters; milliseconds of an adapter to every engine."""
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    model, words = trlpatch.FastLanguageModel.from_pretrained(
        directory, max_seq_length=512, load_in_4bit=False, max_lora_rank=16, num_engines=engines,
        tensor_parallel_size=parallel, enforce_eager=True,
    )  # fmt: skip
    rollout: Any = model.vllm_engine
    try:
        policy = trlpatch.FastLanguageModel.get_peft_model(
            model, r=16, target_modules=TARGETS, use_gradient_checkpointing=False
        )
        gaps = train(policy, words, rollout)
        set_adapter(policy, seed=1)
        return {
            "about": {"location": rollout.location, "devices": [info.devices for info in rollout.infos]},
            "gaps": gaps,
            "versions": rollout.adapter_version,
            "gap": sampled(policy, rollout, trlpatch.lora_request(policy)),
            "gap_base": sampled(policy, rollout, None),
            "sync": sync(policy, rollout),
        }
    finally:
        import trlpatch.ray

        trlpatch.ray.shutdown()


def train(policy: Any, words: Any, rollout: Any) -> list[float]:
    """The gap of every rollout of a short GRPO."""
    import trl
    from datasets import Dataset

    gaps: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        trainer = trl.GRPOTrainer(
            model=policy,
            processing_class=words,
            reward_funcs=odd_tokens,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
            args=trl.GRPOConfig(
                place, max_steps=STEPS, per_device_train_batch_size=16, num_generations=8, max_completion_length=32,
                learning_rate=1e-3, lr_scheduler_type="constant", bf16=True, report_to=[], save_strategy="no",
                logging_steps=1,
            ),
        )  # fmt: skip
        generate = rollout.generate

        def watched(prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
            sampling_params.logprobs = 0
            outputs = generate(prompts, sampling_params=sampling_params, **kwargs)
            gaps.append(gap(trainer.model, outputs))
            return outputs

        rollout.generate = watched
        try:
            trainer.train()
        finally:
            rollout.generate = generate
    return gaps


def sampled(policy: Any, rollout: Any, request: Any) -> float:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=24, logprobs=0, temperature=1.0, seed=0)
    return gap(policy, rollout.generate(PROMPTS, params, lora_request=request, use_tqdm=False))


def sync(policy: Any, rollout: Any) -> dict[str, Any]:
    """From an optimizer step to every engine holding it: all of it, and the part that Ray and the engines take."""
    import torch

    import trlpatch

    whole, sent = [], []
    for seed in range(UPDATES):
        set_adapter(policy, seed=10 + seed)
        torch.cuda.synchronize()
        started = time.perf_counter()
        trlpatch.lora_request(policy)
        whole.append(1e3 * (time.perf_counter() - started))
        sent.append(1e3 * rollout.sync_seconds)
    return {"whole_ms": median(whole[1:]), "sent_ms": median(sent[1:]), "mib": rollout.adapter_bytes / 2**20}


if __name__ == "__main__":
    _, _, model_directory, number, size = sys.argv
    report(measure(model_directory, int(number), int(size)))
