"""What a live adapter costs in generation: no LoRA, vLLM's LoRA layers, single-adapter layers, in one run.

    python benchmarks/bench_generation.py --shape 7b --rank 16 --out generation.json [--gpus 2]

One process per way, each with an engine of its own on the same random-weight model: `base` has no LoRA, `vllm` vLLM's
LoRA layers, `trlpatch` the single-adapter ones. Each generates --tokens tokens for 64 and for 256 sequences, with the
adapter in every request, --repeats times after two to warm up; log-probabilities are asked for, as TRL does. Then
decoding steps are profiled: milliseconds of kernels a step, and the kernels that take most of them. `mixed` is a
batch whose every other request has no adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.gpu.common import random_model, report, run_child
from tests.runs.case import TARGETS
from tests.runs.trainers import PROMPTS

WAYS = ("base", "vllm", "trlpatch")
SEQUENCES = (64, 256)
UTILIZATION = 0.45
_PROFILED = 24


def main() -> int:
    """Run each way in a process of its own; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--gpus", type=int, default=1, help="ways that run at once, a device each")
    parser.add_argument("--timeout", type=int, default=240, help="seconds a process")
    given = parser.parse_args()
    model, ways = random_model(given.shape), given.ways.split(",")
    for way in ways:
        if way not in WAYS:
            parser.error(f"--ways {way}: expected some of {', '.join(WAYS)}")

    def run(place: tuple[str, int]) -> Any:
        way, device = place
        words = [str(model), way, str(given.rank), str(given.tokens), str(given.repeats)]
        cache = f"/tmp/trlpatch-bench-cache/{way}-{os.getpid()}"
        visible = str(device) if given.gpus > 1 else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        return run_child(
            Path(__file__), words, timeout=given.timeout, VLLM_CACHE_ROOT=cache, CUDA_VISIBLE_DEVICES=visible
        )

    with ThreadPoolExecutor(given.gpus) as pool:
        found = list(pool.map(run, islice(zip(ways, cycle(range(given.gpus)), strict=False), len(ways))))
    results = dict(zip(ways, found, strict=True))
    given.out.write_text(json.dumps({"command": " ".join(sys.argv), **vars_of(given), "ways": results}, indent=1))
    print(table(results))
    return int(any("error" in result for result in results.values()))


def vars_of(given: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as JSON takes it."""
    return {name: value for name, value in vars(given).items() if isinstance(value, (str, int))}


def table(results: dict[str, Any]) -> str:
    """Markdown; in parentheses the ratio to the first way."""
    names = [f"{count} seq s" for count in SEQUENCES]
    names += [f"{count} seq kernels ms/step" for count in SEQUENCES] + ["64 seq mixed s", "load s"]
    lines = ["| way | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    first = next(iter(results.values()))
    for way, result in results.items():
        if "error" in result:
            lines.append(f"| {way} | {str(result['error'])[-200:]} |")
            continue
        cells = []
        for name in names:
            value, reference = result["cells"].get(name), first.get("cells", {}).get(name)
            ratio = f" ({value / reference:.2f}x)" if value and reference else ""
            cells.append("" if value is None else f"{value:.3f}{ratio}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    for way, result in results.items():
        for kernel in result.get("kernels", [])[:12]:
            lines.append(f"{way}: {kernel['ms_per_step']:.3f} ms {kernel['calls']:>6} {kernel['name'][:90]}")
    return "\n".join(lines)


# In the child.


def child(model: str, way: str, rank: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Build one engine, time it, profile it."""
    import torch

    from trlpatch.engine.build import build_engine, lora_arguments
    from trlpatch.engine.cudagraphs import compilation_config

    arguments: dict[str, Any] = {
        "model": model, "max_model_len": tokens + 64, "gpu_memory_utilization": UTILIZATION, "max_num_seqs": 256,
        "max_num_batched_tokens": 4096, "enable_prefix_caching": False, "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }  # fmt: skip
    if way != "base":
        arguments |= lora_arguments(rank)
    if graphs := compilation_config(arguments):
        arguments["compilation_config"] = graphs
    started = time.perf_counter()
    llm = build_engine(arguments, layers="trlpatch" if way == "trlpatch" else "vllm")
    cells: dict[str, float] = {"load s": time.perf_counter() - started}
    request = None if way == "base" else _adapter(model, rank)
    kernels: list[dict[str, Any]] = []
    for count in SEQUENCES:
        times = [_timed(llm, [request] * count, tokens) for _ in range(repeats + 2)]
        cells[f"{count} seq s"] = median(times[2:])
        step, found = _profiled(llm, [request] * count)
        cells[f"{count} seq kernels ms/step"] = step
        kernels = kernels or found
    if request is not None:
        mixed = [request if at % 2 else None for at in range(64)]
        cells["64 seq mixed s"] = median(_timed(llm, mixed, tokens) for _ in range(repeats))
    device = torch.cuda.get_device_name()
    return {"cells": {name: round(value, 4) for name, value in cells.items()}, "kernels": kernels, "device": device}


def _timed(llm: Any, requests: list[Any], tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
    prompts = list(islice(cycle(PROMPTS), len(requests)))
    lora = None if all(request is None for request in requests) else requests
    started = time.perf_counter()
    llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
    return time.perf_counter() - started


def _profiled(llm: Any, requests: list[Any]) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of kernels per decoding step, and the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    found = []
    for tokens in (1, 1 + _PROFILED):  # the difference is decoding alone
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            _timed(llm, requests, tokens)
        found.append({event.key: (event.self_device_time_total, event.count) for event in profiler.key_averages()})
    prefill, whole = found
    steps = [
        {
            "name": name,
            "ms_per_step": round((time_us - prefill.get(name, (0, 0))[0]) / 1000 / _PROFILED, 4),
            "calls": count - prefill.get(name, (0, 0))[1],
        }
        for name, (time_us, count) in whole.items()
    ]
    steps.sort(key=lambda kernel: -float(str(kernel["ms_per_step"])))
    return sum(float(str(kernel["ms_per_step"])) for kernel in steps), steps[:20]


def _adapter(model: str, rank: int) -> Any:
    """A saved adapter with values that move the logits, as a request."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    directory = Path(f"/tmp/trlpatch-bench-adapters/{Path(model).name}-{rank}-{os.getpid()}")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        wrapped = get_peft_model(empty, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name.replace(".default", ""): torch.randn(parameter.shape, generator=generator).mul_(0.02).bfloat16()
        for name, parameter in wrapped.named_parameters()
        if "lora_" in name
    }
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    wrapped.peft_config["default"].save_pretrained(str(directory))
    return LoRARequest("bench", 1, str(directory))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        words = sys.argv[2:]
        report(child(words[0], words[1], *map(int, words[2:5])))
    else:
        raise SystemExit(main())
