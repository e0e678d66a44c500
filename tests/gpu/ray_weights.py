"""Full weights to engines on GPUs of their own: `python -m tests.gpu.ray_weights --out OUT.json [--parallel 2]`.

On one GPU more than the engines take. GRPO that trains every weight, by NCCL and by the object store: the gap of every
rollout, and the seconds of each update beside its size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.common import DRIFT, TOLERANCE, random_model
from tests.runs.trainers import PROMPTS

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="GPUs an engine")
    arguments = parser.parse_args()
    model = random_model(arguments.shape)
    report = {way: run(model, way, arguments.engines, arguments.parallel) for way in ("nccl", "tensors")}
    report["judged"] = {
        way: max(one["gaps"]) < TOLERANCE and min(one["control"]) > DRIFT for way, one in report.items()
    }
    arguments.out.write_text(json.dumps(report, indent=1))
    if not all(report["judged"].values()):
        raise SystemExit(f"wrong rollouts: {report['judged']}")


def run(path: Path, way: str, engines: int, parallel: int) -> dict[str, Any]:
    """Train with one way of sending; then send nothing."""
    import trlpatch
    import trlpatch.ray

    trlpatch.PatchFastRL("grpo")
    with tempfile.TemporaryDirectory() as directory:
        made = trlpatch.ray.create_engines(
            path, engines, parallel, enable_lora=False, weight_transfer=way, max_model_len=512, enforce_eager=True
        )
        try:
            found = trained(path, made, Path(directory))
            found["engine"] = made.on_each("weight_route")
            found["control"] = untrained(path, made)
        finally:
            trlpatch.ray.shutdown()
    return found


def trained(path: Path, engines: Any, directory: Path) -> dict[str, Any]:
    """Four steps of GRPO on every weight."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trlpatch

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cuda:0")
    trlpatch.attach_engine(model, engines)
    seconds, gaps = [], []
    sender = engines.weight_sender
    send = sender.send

    def timed(weights: Any, version: str) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        sent = send(weights, version)
        seconds.append({"seconds": time.perf_counter() - began, "bytes": sent.bytes, "parts": sent.parts})
        return sent

    sender.send = timed
    generate = engines.generate

    def scored(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompts, *args, **kwargs)
        gaps.append(max(gap(model, output) for output in outputs))
        return outputs

    engines.generate = scored
    config = trl.GRPOConfig(
        output_dir=str(directory), max_steps=STEPS, per_device_train_batch_size=16, num_generations=4,
        max_completion_length=64, learning_rate=1e-3, bf16=True, report_to=[], save_strategy="no", beta=0.0,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    trainer.train()
    return {"gaps": gaps, "updates": seconds}


def untrained(path: Path, engines: Any) -> list[float]:
    """The gap of rollouts from what was trained, to the model that it started from."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cuda:0")
    outputs = engines.generate(PROMPTS[:4], [SamplingParams(max_tokens=32, logprobs=0)] * 4, use_tqdm=False)
    return [max(gap(model, output) for output in outputs)]


def gap(model: Any, output: Any) -> float:
    """The mean difference of log-probabilities, in nats, between the engine and the model."""
    import torch

    completion = output.outputs[0]
    ids = [*output.prompt_token_ids, *completion.token_ids]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
    ours = torch.log_softmax(logits, dim=-1)[len(output.prompt_token_ids) - 1 : -1]
    total = sum(
        abs(float(ours[place, token]) - step[token].logprob)
        for place, (token, step) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True))
    )
    return total / max(1, len(completion.token_ids))


if __name__ == "__main__":
    main()
