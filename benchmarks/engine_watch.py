"""What a rank says of its engine while it trains: tokens per second, hand-overs, memory, the gap and its control."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.step_timers import GIB, Lines, settle, sync_calls

SAMPLED = 16
"""Tokens of each completion that engine and policy are compared by."""
PROMPTS = 4


class EngineWatch:
    """Wraps what takes weights to an engine, and what asks it, on the instances."""

    def __init__(self, lines: Lines, *, cuda: bool, waits: bool) -> None:
        """`waits`: all ranks begin a hand-over at once, and the device is waited for before and after it."""
        self._lines, self._cuda, self._waits = lines, cuda, waits

    def watch(self, trainer: Any, engine: Any) -> None:
        """Report every hand-over, every check before a rollout, and every call of the engine."""
        import sys

        for owner, name in sync_calls(trainer):
            setattr(owner, name, self._measured("sync", getattr(owner, name)))
        if (hooks := sys.modules.get("trlpatch.hooks")) is not None:
            hooks.lora_request = self._measured("check", hooks.lora_request)  # type: ignore[attr-defined]
        engine.generate = self._counted(engine.generate)

    def _measured(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @functools.wraps(call)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._waits:
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()
                settle()
            memory: dict[str, float] = {}
            if self._cuda and self._waits:
                # What was highest before is of this step, too.
                memory = {"until_gib": torch.cuda.max_memory_allocated() / GIB}
                torch.cuda.reset_peak_memory_stats()
                memory["before_gib"] = torch.cuda.memory_allocated() / GIB
            started = time.perf_counter()
            found = call(*args, **kwargs)
            if self._waits:
                settle()
            seconds = time.perf_counter() - started
            if memory:
                memory["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            self._lines.write(part, seconds=seconds, **memory)
            return found

        return measured

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            outputs = call(*args, **kwargs)
            tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
            self._lines.write("rollout", seconds=time.perf_counter() - started, tokens=tokens)
            return outputs

        return counted


def write_memory(lines: Lines, *, cuda: bool) -> None:
    """Report what this process has held at most: of the GPU, or of the host where there is none."""
    lines.write("memory", **peak_memory(cuda))


def peak_memory(cuda: bool) -> dict[str, float]:
    """Return GiB: `peak_gib` of torch's allocator and `used_gib` of each GPU, or the process's resident set."""
    if not cuda:
        import resource

        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    import torch

    pairs = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    used = max((total - free) / GIB for free, total in pairs)
    return {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "used_gib": used}


def write_gap(trainer: Any, engine: Any, lines: Lines, synchronise: Callable[[], Any] | None = None) -> None:
    """Report how far engine and trained policy are apart, after a last hand-over; every rank calls it.

    `synchronise` hands the policy over and returns the request that carries it, None where the engine of a trainer
    puts it in by itself. The control is the same completions beside the policy without its adapter: what the gap of an
    engine that has none would be. Sampled alike on all ranks, since ranks with one engine have to ask it alike.
    """
    from vllm import SamplingParams

    from tests.runs.measure import gap

    request = (synchronise or synchronisation(trainer))()
    params = SamplingParams(max_tokens=SAMPLED, logprobs=0, temperature=1.0, seed=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": [3 + number % 200] * 8} for number in range(PROMPTS)]
    carried = {} if request is None else {"lora_request": request}
    outputs = engine.generate(prompts, params, use_tqdm=False, **carried)
    model = trainer.model
    found = {"nats": gap(model, outputs)}
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            found["control"] = gap(model, outputs)
    lines.write("policy_gap", **found)


def synchronisation(trainer: Any) -> Callable[[], Any]:
    """Return what this TRL calls before a rollout when the policy has moved."""
    owner, name = next(sync_calls(trainer))
    found: Callable[[], Any] = getattr(owner, name)
    return found
