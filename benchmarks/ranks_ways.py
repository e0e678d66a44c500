"""What each rank of bench_ranks.py does: train, hand over, generate; see there for what the cases are."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_start import build_engines_with, engine_start
from benchmarks.step_timers import GIB, Lines, callback, settle
from benchmarks.step_ways import MODELS, Order, Way, grpo_trainer, plain_policy
from tests.runs.case import versions

RANKS = {
    "ddp-1": 1, "ddp-2": 2, "fsdp2-stock": 2, "fsdp2-trlpatch": 2, "zero3-stock": 2, "zero3-trlpatch": 2,
    "tp-1": 1, "tp-2": 2,
}  # fmt: skip
"""Processes of each case."""

SEQUENCES = 64
"""That one call of `generate` answers."""
REPEATS = 3
SCORED = 8
"""Of these the engine's log-probabilities are compared with the policy's."""


@dataclass(frozen=True)
class Case:
    """What one rank is told.

    Attributes:
        name: of RANKS.
        start: as of `engine_start`, of engines whose speed is measured.
    """

    name: str
    start: str

    @property
    def part(self) -> str:
        """Of bench_ranks.py."""
        return self.name.split("-")[0]

    @property
    def ranks(self) -> int:
        """Processes."""
        return RANKS[self.name]


def run(case: Case, order: Order, lines: Lines) -> None:
    """In a rank's process: build, measure, and report to `lines`."""
    import torch

    if not order.cuda:
        torch.set_num_threads(1)
    if case.ranks > 1:
        _meet(order)
    {"ddp": _data_parallel, "tp": _tensor_parallel}.get(case.part, _sharded)(case, order, lines)
    device = torch.cuda.get_device_name() if order.cuda else "CPU"
    lines.write("done", device=device, versions=versions())


def _meet(order: Order) -> None:
    from accelerate import PartialState

    PartialState(cpu=not order.cuda)


def _engine_arguments(case: Case, order: Order) -> dict[str, Any]:
    return engine_start(case.start if order.cuda else "eager")


def _data_parallel(case: Case, order: Order, lines: Lines) -> None:
    """GRPO by FastLanguageModel, an engine per rank; on GPUs it shares its weights with the rank's model."""
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    way = Way("trlpatch", "trlpatch", engine=_engine_arguments(case, order))
    started = time.perf_counter()
    trainer = grpo_trainer(way, order, *MODELS["trlpatch"](way, order))
    lines.write("loaded", seconds={"all": time.perf_counter() - started})
    trainer.add_callback(callback(trainer, lines, warmup=order.warmup, steps=order.steps))
    trainer.train()


def _sharded(case: Case, order: Order, lines: Lines) -> None:
    """GRPO with an engine per rank that TRL builds, stock or patched: every hand-over of the adapter is timed."""
    import transformers

    if case.name.endswith("trlpatch"):
        import trlpatch

        trlpatch.PatchFastRL("grpo")
    # What a step generates is no matter here, and an eager engine starts at once.
    build_engines_with(enforce_eager=True, **({} if order.cuda else {"dtype": "float32"}))
    if case.part == "fsdp2":
        if not order.cuda:
            from tests.cpu.sharded_ranks import ranks_pass_for_gpus

            ranks_pass_for_gpus()
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        sharding: dict[str, Any] = {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    else:
        sharding = {"deepspeed": _zero3()}
    way = Way("drop-in", "drop-in", config={**sharding, "gradient_checkpointing": False})
    started = time.perf_counter()
    trainer = grpo_trainer(way, order, *plain_policy(way, order))
    lines.write("loaded", seconds={"all": time.perf_counter() - started})
    _watch_hand_overs(trainer, order, lines)

    class Logged(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            name = "sampling/sampling_logp_difference/mean"
            if name in (logs or {}):
                lines.write("log", number=state.global_step, logp_difference=logs[name])

    trainer.add_callback(Logged())
    trainer.train()
    if case.name.endswith("trlpatch"):
        from trlpatch.engine.describe import describe_engines

        lines.write("engines", found=describe_engines())


def _zero3() -> dict[str, Any]:
    import deepspeed.ops  # type: ignore[import-not-found,unused-ignore]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, by all ranks at once
    return {
        "zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def _watch_hand_overs(trainer: Any, order: Order, lines: Lines) -> None:
    """Report what takes the weights to the engine, and the check before a rollout; all ranks begin at once."""
    import sys

    generation, hooks = getattr(trainer, "vllm_generation", None), sys.modules.get("trlpatch.hooks")
    for part, owner, name in (
        ("sync", generation, "sync_weights"),
        ("sync", trainer, "_move_model_to_vllm"),
        ("check", hooks, "lora_request"),
    ):
        if owner is not None and callable(getattr(owner, name, None)):
            setattr(owner, name, _measured(part, getattr(owner, name), order, lines))


def _measured(part: str, call: Callable[..., Any], order: Order, lines: Lines) -> Callable[..., Any]:
    import torch

    @functools.wraps(call)
    def measured(*args: Any, **kwargs: Any) -> Any:
        torch.distributed.barrier()
        settle()
        memory: dict[str, float] = {}
        if order.cuda:
            torch.cuda.reset_peak_memory_stats()
            memory["before_gib"] = torch.cuda.memory_allocated() / GIB
        started = time.perf_counter()
        found = call(*args, **kwargs)
        settle()
        seconds = time.perf_counter() - started
        if order.cuda:
            memory["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        lines.write(part, seconds=seconds, **memory)
        return found

    return measured


def _tensor_parallel(case: Case, order: Order, lines: Lines) -> None:
    """Generation by one engine on one GPU or over two ranks, which ask it alike; without and with the live adapter."""
    from vllm import LLM, SamplingParams

    import trlpatch
    from tests.gpu.common import set_adapter
    from tests.runs.measure import gap

    started = time.perf_counter()
    settings: dict[str, Any] = {
        "enable_lora": True, "max_lora_rank": order.rank, "max_loras": 1, "max_model_len": order.length, "seed": 0,
        "logprobs_mode": "processed_logprobs", "gpu_memory_utilization": order.utilization,
        **({} if order.cuda else {"dtype": "float32"}), **_engine_arguments(case, order),
    }  # fmt: skip
    if case.ranks > 1:
        settings |= {"tensor_parallel_size": case.ranks, "distributed_executor_backend": "external_launcher"}
        if not order.cuda:
            from tests.cpu.sharded_ranks import with_shared_memory_of_its_own

            with_shared_memory_of_its_own()
    engine = LLM(model=order.model, **settings)
    policy, _ = plain_policy(Way("tp", "drop-in"), order)
    if order.cuda:
        policy = policy.cuda()
    policy = trlpatch.attach_engine(policy, engine)
    set_adapter(policy, seed=1)
    lines.write("loaded", seconds={"all": time.perf_counter() - started})
    prompts = [{"prompt_token_ids": [3 + number % 200] * 16} for number in range(SEQUENCES if order.cuda else 4)]
    params = SamplingParams(max_tokens=order.tokens, ignore_eos=True, temperature=1.0, logprobs=0)
    for name, request in (("base", None), ("adapter", trlpatch.lora_request(policy))):
        for number in range(1 + REPEATS):
            settle()
            began = time.perf_counter()
            outputs = engine.generate(prompts, params, lora_request=request, use_tqdm=False)
            settle()
            if number:
                lines.write("generation", what=name, seconds=time.perf_counter() - began, tokens=order.tokens)
        found: Any = policy
        with policy.disable_adapter() if request is None else _nothing():
            lines.write("gap", what=name, nats=gap(found, outputs[:SCORED]))
        lines.write("sampled", what=name, tokens=[list(output.outputs[0].token_ids[:8]) for output in outputs[:4]])
    from trlpatch.engine.describe import describe_engines

    lines.write("engines", found=describe_engines())


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def environment(case: Case, rank: int, devices: str | None, scratch: Path) -> dict[str, str]:
    """Return what a rank of this case needs beside `step_ways.environment`."""
    # Multicast over NVLink is off where others share the host's GPUs: neither NCCL nor vLLM's own all-reduce uses it.
    found = {
        "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_CACHE_ROOT": str(scratch / f"vllm-cache{rank}"),
        "DS_ACCELERATOR": "cpu" if devices is None else "cuda",
    }  # fmt: skip
    if devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = devices
    if case.ranks > 1:
        found |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE":
            str(case.ranks), "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": f"ranks{os.getpid()}",
        }  # fmt: skip
    return found
