"""The ways to divide a GRPO run between a trainer's GPU and rollout GPUs; see bench_ray.py for what they are."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engine_start import build_engines_with, engine_start
from benchmarks.step_timers import GIB, Lines, settle
from benchmarks.step_ways import MODELS, Order, Way, grpo_trainer, one_device, plain_policy
from tests.runs.case import TARGETS, versions
from tests.runs.measure import odd_tokens
from tests.runs.trainers import PROMPTS

RAY_WAYS = ("colocated", "stock", "ray", "ray-prefetch", "ray-async", "server", "probe")

_AS_STEP_WAYS = {"colocated": "trlpatch", "stock": "stock"}
"""Ways of bench_step.py, on the trainer's GPU alone."""

_SERVER_UP_S = 300
_RAY_ATTEMPTS = 6
_KEPT = ("loss", "reward", "completions/mean_length", "sampling/sampling_logp_difference/mean")
_PREFIXES = ("ray/", "perf/", "sample/", "rollout/", "num_steps_off_policy", "async")
"""What of a trainer's log is written down."""


@dataclass(frozen=True)
class Beside:
    """What bench_ray.py is asked beside an `Order`.

    Attributes:
        gpus: one trains, the others generate.
        staleness: `max_staleness` of ray-async.
        sdpa: ray-async computes attention by torch, segment by segment, where the kernel that TRL takes from the hub
            (FlashAttention 3) cannot be had.
        start: "compiled", "graphs" or "eager", as in bench_ranks.py.
    """

    gpus: int
    staleness: int
    sdpa: bool
    start: str = "compiled"


def parse(spec: str, cuda: bool) -> Way:
    """Read NAME+KEY=VALUE+... as `Way.parse` does: KEY of PatchFastRL, engine.KEY of `create_engines`, config.KEY.

    Raises:
        ValueError: nothing is called so, or it cannot run here.
    """
    name, *_ = spec.split("+")
    if name not in RAY_WAYS:
        raise ValueError(f"way {name!r}: expected one of {', '.join(RAY_WAYS)}")
    if not cuda and name in ("stock", "server"):
        raise ValueError(f"way {name!r}: TRL's push needs a GPU")
    # On a CPU nothing is shared.
    stands_in = _AS_STEP_WAYS.get(name, "trlpatch-attached") if cuda or name != "colocated" else "trlpatch-attached"
    parsed = Way.parse("+".join([stands_in, *spec.split("+")[1:]]))
    return Way(spec, stands_in, parsed.options, parsed.engine, parsed.config, parsed.slow, parsed.env)


def run(spec: str, order: Order, beside: Beside, lines: Lines) -> None:
    """In the child: build, train, and report to `lines`."""
    import torch

    name, way = spec.split("+")[0], parse(spec, order.cuda)
    started_so = engine_start(beside.start) if order.cuda else {}
    if name == "stock":
        build_engines_with(**started_so)
    elif name != "server":
        way = replace(way, engine={**started_so, **way.engine})
    if not order.cuda:
        torch.set_num_threads(1)
    started = time.perf_counter()
    if name == "probe":
        import trlpatch
        from benchmarks.ray_probe import LENGTHS, probe

        with _engines(way, order, beside, max_model_len=order.tokens * max(LENGTHS) + 64) as engines:
            policy, _ = plain_policy(way, order)
            if order.cuda:
                policy = policy.cuda()
            probe(trlpatch.attach_engine(policy, engines), engines, order, lines)
        lines.write("done", device=_device(order), versions=versions())
        return
    with _BUILDERS[name](way, order, beside) as (trainer, engines):
        lines.write("loaded", seconds={"all": time.perf_counter() - started})
        watch = _Steps(trainer, engines, order, lines)
        trainer.add_callback(watch.callback())
        trainer.train()
    lines.write("done", device=_device(order), versions=versions())


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
def _engines(way: Way, order: Order, beside: Beside, **more: Any) -> Iterator[Any]:
    import trlpatch.ray

    settings: dict[str, Any] = {
        "num_engines": max(1, beside.gpus - 1) if order.cuda else 1, "max_lora_rank": max(order.rank, 8),
        "enable_lora": bool(order.rank), "max_model_len": order.length, "seed": 0,
        "logprobs_mode": "processed_logprobs", **({} if order.cuda else {"dtype": "float32", "enforce_eager": True}),
    }  # fmt: skip
    if not order.cuda:
        _start_ray()
    engines = trlpatch.ray.create_engines(order.model, **{**settings, **way.engine, **more})
    try:
        yield engines
    finally:
        trlpatch.ray.shutdown()


def _start_ray() -> None:
    """Start a small cluster; on a busy machine Ray gives up at times, and does it when asked again."""
    import ray

    for attempt in range(_RAY_ATTEMPTS):
        try:
            ray.init(
                num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False,
                _temp_dir=tempfile.mkdtemp(prefix="ray", dir="/tmp"),
            )  # fmt: skip
            return
        except Exception:
            ray.shutdown()
            if attempt + 1 == _RAY_ATTEMPTS:
                raise
            time.sleep(2)


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
    with _engines(way, order, beside) as engines:
        arguments = trlpatch.ray.async_rollouts(
            engines, odd_tokens, Dataset.from_dict({"prompt": PROMPTS * 64}),
            sampling_params={"ignore_eos": True}, args=config, **({"peft_config": lora} if order.rank else {}),
            processing_class=AutoTokenizer.from_pretrained(order.model),
        )  # fmt: skip
        yield AsyncGRPOTrainer(order.model, **arguments), engines


@contextmanager
def _server(way: Way, order: Order, beside: Beside) -> Iterator[tuple[Any, Any]]:
    """TRL's own server on the other GPUs, stock: merge, push every parameter, unmerge."""
    port = 8000 + os.getpid() % 1000
    settings = {
        "--model": order.model, "--port": port, "--dtype": "bfloat16", "--gpu-memory-utilization": 0.9,
        "--max-model-len": order.length, "--data-parallel-size": max(1, beside.gpus - 1),
    }  # fmt: skip
    command = [sys.executable, "-c", "from trl.cli import main; main()", "vllm-serve"]
    command += [str(word) for setting in settings.items() for word in setting]
    others = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(1, beside.gpus)))}
    server = subprocess.Popen(command, env=others, start_new_session=True)
    try:
        _wait_for(server, f"http://localhost:{port}/health/")
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        config = {"vllm_mode": "server", "vllm_server_host": "localhost", "vllm_server_port": port, **way.config}
        stock = Way(way.spec, "stock", config=config)
        yield grpo_trainer(stock, order, *plain_policy(stock, order)), None
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


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


class _Steps:
    """Whole steps, the time of generation and sync in each, and what engines and trainer say; nothing waits for it."""

    def __init__(self, trainer: Any, engines: Any, order: Order, lines: Lines) -> None:
        self._trainer, self._engines, self._order, self._lines = trainer, engines, order, lines
        self._seconds = {"generation": 0.0, "sync": 0.0}
        self._version, self._tokens = 0, 0
        generation = getattr(trainer, "vllm_generation", None)
        owners = (generation, trainer)
        client = next((found for one in owners if (found := getattr(one, "vllm_client", None)) is not None), None)
        engine = next((found for one in owners if (found := getattr(one, "llm", None)) is not None), None)
        for part, owner, name in (
            ("sync", generation, "sync_weights"), ("sync", trainer, "_move_model_to_vllm"),
            ("sync", trainer, "_sync_weight"), ("generation", engine, "generate"), ("generation", client, "generate"),
        ):  # fmt: skip
            if owner is not None and callable(getattr(owner, name, None)):
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - started

        return timed

    def callback(self) -> Any:
        """Make the transformers callback that writes a line for each step."""
        import torch
        from transformers import TrainerCallback

        watch, cuda = self, self._order.cuda

        class Callback(TrainerCallback):  # type: ignore[misc]
            started: float | None = None

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if self.started is None:
                    settle()
                    self.started = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                settle()
                now = time.perf_counter()
                assert self.started is not None
                phase = "warmup" if state.global_step <= watch._order.warmup else "timed"
                entry = {"number": state.global_step, "phase": phase, "seconds": now - self.started, **watch.take()}
                if cuda:
                    entry["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
                watch._lines.write("step", **entry)
                self.started = time.perf_counter()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                kept = {
                    name: value
                    for name, value in (logs or {}).items()
                    if (name in _KEPT or name.startswith(_PREFIXES)) and isinstance(value, int | float)
                }
                if kept:
                    watch._lines.write("log", number=state.global_step, **kept)

        return Callback()

    def take(self) -> dict[str, Any]:
        """Return what was counted since the last call."""
        found: dict[str, Any] = {f"{part}_s": seconds for part, seconds in self._seconds.items() if seconds}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        if self._engines is None:
            return found
        tokens = sum(one.tokens for one in self._engines.health() if not isinstance(one, BaseException))
        found |= {"engine_tokens": tokens - self._tokens}
        self._tokens = tokens
        if self._engines.adapter_version != self._version:
            self._version = self._engines.adapter_version
            found |= {"to_engines_s": self._engines.sync_seconds, "sync_bytes": self._engines.adapter_bytes}
        return found
