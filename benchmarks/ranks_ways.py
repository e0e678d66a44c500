"""What each rank of bench_ranks.py does: train, hand over, generate; see there for what the cases are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engine_start import build_engines_with, engine_start, keep_weights_as_they_are
from benchmarks.engine_watch import EngineWatch, write_gap, write_memory
from benchmarks.step_timers import Lines, callback, engine_of, settle
from benchmarks.step_ways import MODELS, Order, Way, grpo_trainer, plain_policy
from tests.runs.case import versions

PARTS = ("ddp", "fsdp2", "zero2", "zero3", "tp", "grpotp")
WAYS = ("stock", "trlpatch")
PARALLEL = (2, 4)
"""Ranks of one engine that are measured: 4 is the most that the key-value heads of the 7B shape allow."""

SEQUENCES = 64
"""That one call of `generate` answers."""
REPEATS = 3
SCORED = 8
"""Of these the engine's log-probabilities are compared with the policy's."""


@dataclass(frozen=True)
class Case:
    """What one rank is told.

    Attributes:
        part: of PARTS.
        way: of WAYS.
        ranks: processes.
        start: as of `engine_start`.
    """

    part: str
    way: str
    ranks: int
    start: str

    @property
    def name(self) -> str:
        """PART-WAY-RANKS, as `named` reads it."""
        return f"{self.part}-{self.way}-{self.ranks}"

    @classmethod
    def named(cls, name: str, start: str) -> Case:
        """Read PART-WAY-RANKS.

        Raises:
            ValueError: nothing is called so, or has so many ranks.
        """
        part, way, ranks = (*name.split("-"), "", "", "")[:3]
        if name.count("-") != 2 or part not in PARTS or way not in WAYS or not ranks.isdecimal() or int(ranks) < 1:
            raise ValueError(
                f"case {name!r}: expected PART-WAY-RANKS, PART of {', '.join(PARTS)}, WAY of {', '.join(WAYS)}"
            )
        if part == "tp" and way == "stock":
            raise ValueError(f"case {name!r}: stock TRL builds no engine without training; expected grpotp-stock-N")
        if part not in ("ddp", "tp") and int(ranks) < 2:
            raise ValueError(f"case {name!r}: nothing is divided over one rank, expected 2 or more")
        return cls(part, way, int(ranks), start)


def cases_of(parts: Sequence[str], ranks: int) -> list[str]:
    """Return the names of the cases of some parts on so many ranks; engines are divided by each of PARALLEL.

    Raises:
        ValueError: a part is not of PARTS, or ranks are fewer than two.
    """
    if ranks < 2:
        raise ValueError(f"--ranks {ranks}: expected 2 or more")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"{', '.join(unknown)}: expected parts of {', '.join(PARTS)}")
    parallel = [number for number in PARALLEL if number <= ranks]
    made = {
        "ddp": ["ddp-trlpatch-1", f"ddp-stock-{ranks}", f"ddp-trlpatch-{ranks}"],
        "fsdp2": [f"fsdp2-{way}-{ranks}" for way in WAYS],
        "zero2": [f"zero2-{way}-{ranks}" for way in WAYS],
        "zero3": [f"zero3-{way}-{ranks}" for way in WAYS],
        "tp": ["tp-trlpatch-1", *(f"tp-trlpatch-{number}" for number in parallel)],
        "grpotp": [f"grpotp-{way}-{number}" for number in parallel for way in WAYS],
    }
    return [name for part in parts for name in made[part]]


def run(case: Case, order: Order, lines: Lines) -> None:
    """In a rank's process: build, measure, and report to `lines`."""
    import torch

    if not order.cuda:
        torch.set_num_threads(1)
        keep_weights_as_they_are()
        if case.part in ("tp", "grpotp") and case.ranks > 1:
            from tests.cpu.sharded_ranks import with_shared_memory_of_its_own

            with_shared_memory_of_its_own()
    if case.ranks > 1:
        from accelerate import PartialState

        PartialState(cpu=not order.cuda)
    (_tensor_parallel if case.part == "tp" else _train)(case, order, lines)
    write_memory(lines, cuda=order.cuda)
    device = torch.cuda.get_device_name() if order.cuda else "CPU"
    lines.write("done", device=device, versions=versions())


def _engine_arguments(case: Case, order: Order) -> dict[str, Any]:
    at_once = order.completions * (case.ranks if case.part == "grpotp" else 1)
    return engine_start(case.start if order.cuda else "eager", at_once)


def _train(case: Case, order: Order, lines: Lines) -> None:
    """GRPO with an engine per rank, or one over all; patched `ddp` by FastLanguageModel, the rest as TRL builds it.

    On GPUs an engine of FastLanguageModel shares its weights with the rank's model.
    """
    from tests.gpu.common import set_adapter

    if case.way == "trlpatch":
        import trlpatch

        trlpatch.PatchFastRL("grpo")
    arguments = _engine_arguments(case, order)
    config = {} if case.part == "ddp" else {**_divided(case, order), "gradient_checkpointing": False}
    started = time.perf_counter()
    if case.part == "ddp" and case.way == "trlpatch":
        way = Way("trlpatch", "trlpatch", engine=arguments)
        model, words = MODELS["trlpatch"](way, order)
    else:
        # TRL asks for bfloat16 by itself.
        build_engines_with(**arguments, **({} if order.cuda else {"dtype": "float32"}))
        way = Way("drop-in", "drop-in", config=config)
        model, words = plain_policy(way, order)
    set_adapter(model, seed=1)  # large enough for an engine without it to be told apart
    trainer = grpo_trainer(way, order, model, words)
    lines.write("loaded", seconds={"all": time.perf_counter() - started})
    engine = engine_of(trainer)
    # Whole steps of ddp are compared with those of one rank: nothing is waited for in them.
    EngineWatch(lines, cuda=order.cuda, waits=case.part != "ddp").watch(trainer, engine)
    trainer.add_callback(callback(trainer, lines, warmup=order.warmup, steps=order.steps))
    trainer.train()
    write_gap(trainer, engine, lines)
    if case.way == "trlpatch":
        from trlpatch.engine.describe import describe_engines

        lines.write("engines", found=describe_engines())


def _divided(case: Case, order: Order) -> dict[str, Any]:
    """Arguments of GRPOConfig that divide the model, or the engine, over the ranks."""
    if case.part == "grpotp":
        return {"vllm_tensor_parallel_size": case.ranks}
    if case.part == "fsdp2":
        if not order.cuda:
            from tests.cpu.sharded_ranks import ranks_pass_for_gpus

            ranks_pass_for_gpus()
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    import deepspeed.ops  # type: ignore[import-not-found,unused-ignore]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, by all ranks at once
    stage: dict[str, Any] = {
        "zero_optimization": {"stage": int(case.part[-1])}, "bf16": {"enabled": "auto"}, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    return {"deepspeed": stage}


def _tensor_parallel(case: Case, order: Order, lines: Lines) -> None:
    """Generation by one engine on one GPU or over its ranks, which ask it alike; without and with the live adapter."""
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
                seconds = time.perf_counter() - began
                lines.write("generation", what=name, seconds=seconds, tokens=len(prompts) * order.tokens)
        scored = outputs[:SCORED]
        with contextlib.nullcontext() if request else policy.disable_adapter():
            lines.write("gap", what=name, nats=gap(policy, scored))
        if request is None:  # what an engine without the adapter would give
            lines.write("gap", what="control", nats=gap(policy, scored))
        lines.write("sampled", what=name, tokens=[list(output.outputs[0].token_ids[:8]) for output in outputs[:4]])
    from trlpatch.engine.describe import describe_engines

    lines.write("engines", found=describe_engines())
