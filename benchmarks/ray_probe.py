"""What the model of a step (trlpatch/scale) wants to know of engines on Ray actors, measured alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.step_timers import Lines
from benchmarks.step_ways import Order

REPEATS = 5
SIZE = 80 * 2**20
"""Bytes of an adapter of r=16 at 7B."""
SEQUENCES = (1, 16, 64, 128, 256)
PROMPT = 16
LENGTHS = (1, 4)
"""Of --tokens."""


def probe(policy: Any, engines: Any, order: Order, lines: Lines) -> None:
    """Write a line for each measurement: calls, the object store, and the engines' curve of batch sizes."""
    for name, value in _calls(engines, order.cuda).items():
        lines.write("input", name=name, value=value)
    for length in LENGTHS if order.cuda else (1,):
        for sequences in SEQUENCES if order.cuda else SEQUENCES[:2]:
            lines.write("point", **_point(policy, engines, sequences, order.tokens * length))


def _seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    call()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return median(taken)


def _calls(engines: Any, cuda: bool) -> dict[str, float]:
    import numpy as np
    import ray
    import torch

    buffer = torch.zeros(SIZE // 2, dtype=torch.int16, device="cuda" if cuda else "cpu")
    call = _seconds(lambda: engines.health())
    put = _seconds(lambda: ray.put(buffer.cpu().numpy()))
    held = ray.put(np.zeros(SIZE // 2, dtype=np.int16))
    got = _seconds(lambda: engines.on_each("call", _take, held, cuda))
    return {
        "remote_call_s": call,
        "object_store_put_bandwidth": SIZE / put,
        "object_store_get_bandwidth": SIZE / max(got - call, 1e-6),
    }


def _take(llm: Any, held: Any, cuda: bool) -> int:
    """In an engine's process: read an object and bring it to the device, as an adapter is."""
    import ray
    import torch

    array = ray.get(held) if isinstance(held, ray.ObjectRef) else held
    there = torch.tensor(array, device="cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.synchronize()
    return int(there.numel())


def _point(policy: Any, engines: Any, sequences: int, tokens: int) -> dict[str, Any]:
    """Time so many completions of exactly `tokens` tokens on each engine, with the live adapter where there is one."""
    from vllm import SamplingParams

    import trlpatch

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, logprobs=0)
    count = sequences * len(engines.handles)
    prompts = [{"prompt_token_ids": [3 + number % 200] * PROMPT} for number in range(count)]
    request = trlpatch.lora_request(policy)
    seconds = _seconds(lambda: engines.generate(prompts, params, use_tqdm=False, lora_request=request), 3)
    return {
        "sequences": sequences, "tokens": tokens, "prompt": PROMPT, "seconds": seconds,
        "engines": len(engines.handles),
    }  # fmt: skip
