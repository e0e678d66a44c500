"""The ways to divide a GRPO run between a trainer's GPU and rollout GPUs; see bench_ray.py for what they are."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engine_start import build_engines_with, engine_start, keep_weights_as_they_are
from benchmarks.engine_watch import peak_memory, write_gap
from benchmarks.ray_cluster import start
from benchmarks.ray_steps import Steps, engines_memory
from benchmarks.step_timers import Lines, engine_of
from benchmarks.step_ways import MODELS, Order, Way, grpo_trainer, one_device, plain_policy
from tests.gpu.common import set_adapter
from tests.runs.case import TARGETS, versions
from tests.runs.measure import odd_tokens
from tests.runs.trainers import PROMPTS

RAY_WAYS = ("colocated", "stock", "ray", "ray-prefetch", "ray-async", "server", "probe")

_AS_STEP_WAYS = {"colocated": "trlpatch", "stock": "stock"}
"""Ways of bench_step.py, on the trainer's GPU alone."""

_SERVER_UP_S = 300
_OF_RANKS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
"""What a server must not take for its own."""


@dataclass(frozen=True)
class Beside:
    """What bench_ray.py is asked beside an `Order`.

    Attributes:
        gpus: the trainers' and the engines'.
        staleness: `max_staleness` of ray-async.
        sdpa: ray-async computes attention by torch, segment by segment, where the kernel that TRL takes from the hub
            (FlashAttention 3) cannot be had.
        start: "compiled", "graphs" or "eager", as in bench_ranks.py.
        trainers: ranks, by DDP; each has engines of its own, but for AsyncGRPOTrainer's.
    """

    gpus: int
    staleness: int
    sdpa: bool
    start: str = "compiled"
    trainers: int = 1

    def engines(self, way: Way, *, every_rank: bool = True) -> int:
        """Return how many engines a trainer has, or all have together.

        Raises:
            ValueError: the GPUs that are left cannot be divided so.
        """
        each = int(way.engine.get("tensor_parallel_size", 1)) * (self.trainers if every_rank else 1)
        found, rest = divmod(self.gpus - self.trainers, each)
        if not found or rest:
            raise ValueError(
                f"{way.spec}: {self.gpus} GPUs, {self.trainers} of them for trainers, leave "
                f"{self.gpus - self.trainers}; expected a multiple of {each}"
            )
        return int(way.engine.get("num_engines", found))


def parse(spec: str, cuda: bool) -> Way:
    """Read NAME+KEY=VALUE+... as `Way.parse` does: KEY of PatchFastRL, engine.KEY of `create_engines`, config.KEY.

    Raises:
        ValueError: nothing is called so, or it cannot run here.
    """
    name, *_ = spec.split("+")
    if name not in RAY_WAYS:
        raise ValueError(f"way {name!r}: expected one of {', '.join(RAY_WAYS)}")
    if not cuda and name == "server":
        raise ValueError(f"way {name!r}: TRL's server is sent weights over NCCL, which needs GPUs")
    stands_in = _AS_STEP_WAYS.get(name, "trlpatch-attached")
    parsed = Way.parse("+".join([stands_in, *spec.split("+")[1:]]))
    return Way(spec, stands_in, parsed.options, parsed.engine, parsed.config, parsed.slow, parsed.env)


def run(spec: str, order: Order, beside: Beside, lines: Lines) -> None:
    """In the child: build, train, and report to `lines`."""
    import torch

    name, way = spec.split("+")[0], parse(spec, order.cuda)
    # On a CPU vLLM compiles for a minute, and again at every new batch size: no way does.
    started_so = engine_start(beside.start if order.cuda else "eager")
    if name == "stock":
        build_engines_with(**started_so, **({} if order.cuda else {"dtype": "float32"}))  # TRL asks for bfloat16
    elif name != "server":
        way = replace(way, engine={**started_so, **way.engine})
    if not order.cuda:
        torch.set_num_threads(1)
        keep_weights_as_they_are()
    started = time.perf_counter()
    if name == "probe":
        import trlpatch
        from benchmarks.ray_probe import LENGTHS, probe

        with _engines(way, order, beside, max_model_len=order.tokens * max(LENGTHS) + 64) as engines:
            policy, _ = plain_policy(way, order)
            if order.cuda:
                policy = policy.cuda()
            probe(trlpatch.attach_engine(policy, engines), engines, order, lines)
            lines.write("memory", engines_gib=engines_memory(engines, cuda=order.cuda))
        lines.write("done", device=_device(order), versions=versions())
        return
    if beside.trainers > 1:
        from accelerate import PartialState

        PartialState(cpu=not order.cuda)
    with _BUILDERS[name](way, order, beside) as (trainer, engines):
        lines.write("loaded", seconds={"all": time.perf_counter() - started})
        set_adapter(trainer.model, seed=1)  # large enough for engines without it to be told apart
        trainer.add_callback(Steps(trainer, engines, order, lines).callback())
        trainer.train()
        there = {"engines_gib": engines_memory(engines, cuda=order.cuda)} if engines else {}
        lines.write("memory", **peak_memory(order.cuda), **there)
        _compare(name, trainer, engines, order, lines)
    lines.write("done", device=_device(order), versions=versions())


def _compare(name: str, trainer: Any, engines: Any, order: Order, lines: Lines) -> None:
    """Report how far engines and policy are apart; a server's engines can be asked by TRL's client alone."""
    if name == "ray-async":
        if engines is not None and order.rank:
            import trlpatch

            trainer.model.get_base_model().set_attn_implementation("sdpa")  # TRL's own takes packed sequences only
            model = trlpatch.attach_engine(trainer.model, engines)
            write_gap(trainer, engines, lines, lambda: trlpatch.lora_request(model))
    elif name != "server":
        if (ahead := getattr(engines, "_prefetched", None)) is not None and ahead._underway is not None:
            ahead._underway.wait()  # of a step that is none any more; engines that are busy take no adapter
        trainer.model.eval()  # and it is not for this
        write_gap(trainer, engine_of(trainer), lines)


def _device(order: Order) -> str:
    import torch

    return torch.cuda.get_device_name() if order.cuda else "CPU"


@contextmanager
def _colocated(way: Way, order: Order, beside: Beside) -> Iterator[tuple[Any, Any]]:
    if way.name != "stock":
        import trlpatch

        trlpatch.PatchFastRL("grpo", **way.options)
    model, words = MODELS[way.name](way, order)
    yield grpo_trainer(way, order, model, words), None


@contextmanager
def _engines(way: Way, order: Order, beside: Beside, *, every_rank: bool = True, **more: Any) -> Iterator[Any]:
    import trlpatch.ray

    number = beside.engines(way, every_rank=every_rank)
    settings: dict[str, Any] = {
        "num_engines": number, "max_lora_rank": max(order.rank, 8),
        "enable_lora": bool(order.rank), "max_model_len": order.length, "seed": 0,
        "logprobs_mode": "processed_logprobs", **({} if order.cuda else {"dtype": "float32"}),
    }  # fmt: skip
    if not order.cuda and "RAY_ADDRESS" not in os.environ:
        start(number, cuda=False)
    engines = trlpatch.ray.create_engines(order.model, **{**settings, **way.engine, **more})
    try:
        yield engines
    finally:
        trlpatch.ray.shutdown()


@contextmanager
def _on_ray(way: Way, order: Order, beside: Beside, **more: Any) -> Iterator[tuple[Any, Any]]:
    import trlpatch

    trlpatch.PatchFastRL("grpo", **way.options)
    with _engines(way, order, beside, **more) as engines:
        policy, words = plain_policy(way, order)
        if order.cuda:  # engine and policy are compared where it trains
            policy = policy.cuda()
        yield grpo_trainer(way, order, trlpatch.attach_engine(policy, engines), words), engines


@contextmanager
def _asynchronous(way: Way, order: Order, beside: Beside) -> Iterator[tuple[Any, Any]]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    import trlpatch.ray
    from tests.ray.async_runs import stand_in

    if beside.sdpa:
        stand_in()
    trlpatch.PatchFastRL(**way.options)
    settings: dict[str, Any] = {
        "output_dir": str(Path(order.model) / "out"), "per_device_train_batch_size": order.per_device,
        "gradient_accumulation_steps": order.completions // order.per_device, "num_generations": order.generations,
        "max_completion_length": order.tokens, "max_steps": order.warmup + order.steps, "logging_steps": 1,
        "learning_rate": order.learning_rate, "lr_scheduler_type": "constant", "seed": 0, "report_to": [],
        "save_strategy": "no", "bf16": order.cuda, "use_cpu": not order.cuda, "disable_tqdm": True,
        "max_staleness": beside.staleness, "weight_sync_steps": 1, "token_budget": order.length * order.per_device,
    }  # fmt: skip
    known = AsyncGRPOConfig.__dataclass_fields__
    config = AsyncGRPOConfig(**{**{name: settings[name] for name in settings if name in known}, **way.config})
    one_device(config)
    lora = LoraConfig(r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    engines_here = _engines(way, order, beside, every_rank=False) if _first() else nullcontext()
    with engines_here as engines:
        arguments = trlpatch.ray.async_rollouts(
            engines, odd_tokens, Dataset.from_dict({"prompt": PROMPTS * 64}),
            sampling_params={"ignore_eos": True}, args=config, **({"peft_config": lora} if order.rank else {}),
            processing_class=AutoTokenizer.from_pretrained(order.model),
        )  # fmt: skip
        yield AsyncGRPOTrainer(order.model, **arguments), engines


@contextmanager
def _server(way: Way, order: Order, beside: Beside) -> Iterator[tuple[Any, Any]]:
    """TRL's own server on the other GPUs, stock: merge, push every parameter, unmerge. The first rank starts it."""
    if not _first():
        stock = Way(way.spec, "stock", config={"vllm_mode": "server", **way.config})
        yield grpo_trainer(stock, order, *plain_policy(stock, order)), None
        return
    port = 8000 + os.getpid() % 1000
    settings = {
        "--model": order.model, "--port": port, "--dtype": "bfloat16", "--gpu-memory-utilization": 0.9,
        "--max-model-len": order.length, "--data-parallel-size": beside.gpus - beside.trainers,
    }  # fmt: skip
    command = [sys.executable, "-c", "from trl.cli import main; main()", "vllm-serve"]
    command += [str(word) for setting in settings.items() for word in setting]
    others = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(beside.trainers, beside.gpus)))}
    others = {name: value for name, value in others.items() if name not in _OF_RANKS}
    server = subprocess.Popen(command, env=others, start_new_session=True)
    try:
        _wait_for(server, f"http://localhost:{port}/health/")
        config = {"vllm_mode": "server", "vllm_server_host": "localhost", "vllm_server_port": port, **way.config}
        stock = Way(way.spec, "stock", config=config)
        yield grpo_trainer(stock, order, *plain_policy(stock, order)), None
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _SERVER_UP_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"trl vllm-serve ended with {server.returncode} before it answered")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{url}: no answer in {_SERVER_UP_S} s")


_BUILDERS: dict[str, Callable[..., Any]] = {
    "colocated": _colocated,
    "stock": _colocated,
    "ray": _on_ray,
    "ray-prefetch": functools.partial(_on_ray, prefetch=1),
    "ray-async": _asynchronous,
    "server": _server,
}
