"""The ways to run the same GRPO step, each built in a process of its own; see bench_step.py for what they are."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.step_timers import Lines, callback, slow_down
from tests.runs.case import TARGETS, versions
from tests.runs.measure import odd_tokens
from tests.runs.trainers import PROMPTS

WAYS = ("stock", "drop-in", "trlpatch", "trlpatch-separate", "trlpatch-attached", "unsloth")

_KINDS = ("engine", "config", "slow", "env")


@dataclass(frozen=True)
class Way:
    """One way with its options: `NAME+KEY=VALUE+...`.

    Attributes:
        spec: as it was written.
        name: one of WAYS.
        options: keyword arguments of PatchFastRL.
        engine: engine.KEY=VALUE, of vLLM's `LLM` or of `from_pretrained`.
        config: config.KEY=VALUE, of GRPOConfig.
        slow: slow.PART=SECONDS, added to every call of that part: to see that the table moves.
        env: env.NAME=VALUE, environment variables.
    """

    spec: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str) -> Way:
        """Read it.

        Raises:
            ValueError: nothing is called so, or the way takes no such option.
        """
        name, *given = spec.split("+")
        if name not in WAYS:
            raise ValueError(f"way {name!r}: expected one of {', '.join(WAYS)}")
        sorted_out: dict[str, dict[str, Any]] = {kind: {} for kind in ("options", *_KINDS)}
        for text in given:
            key, equals, value = text.partition("=")
            kind, dot, rest = key.partition(".")
            if not equals or (dot and kind not in _KINDS):
                raise ValueError(f"way {spec!r}: {text!r} is not [{'.|'.join(_KINDS)}.]KEY=VALUE")
            sorted_out[kind if dot else "options"][rest if dot else key] = value if kind == "env" else _literal(value)
        if sorted_out["options"] and name in ("stock", "unsloth"):
            raise ValueError(
                f"way {spec!r}: PatchFastRL, which takes {', '.join(sorted_out['options'])}, is not called"
            )
        if sorted_out["engine"] and name in ("stock", "drop-in"):
            raise ValueError(f"way {spec!r}: TRL builds the engine, and takes config.vllm_... only")
        return cls(spec, name, **sorted_out)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclass(frozen=True)
class Order:
    """What all ways have in common."""

    model: str
    tokens: int
    completions: int
    per_device: int
    generations: int
    rank: int
    sleep: bool
    utilization: float
    warmup: int
    steps: int
    parts: int
    learning_rate: float
    cuda: bool

    @property
    def length(self) -> int:
        """Prompt and completion together; the prompts are a few words."""
        return self.tokens + 64

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one process."""
        return self.warmup + self.steps + self.parts


def run(way: Way, order: Order, lines: Lines) -> None:
    """In the child: build, train, and report to `lines`."""
    import torch

    clock = [time.perf_counter()]
    _import(way, order)
    clock.append(time.perf_counter())
    model, words = MODELS[way.name](way, order)
    clock.append(time.perf_counter())
    trainer = grpo_trainer(way, order, model, words)
    clock.append(time.perf_counter())
    names = ("import", "model", "trainer")
    lines.write("loaded", seconds={name: clock[at + 1] - clock[at] for at, name in enumerate(names)})
    slow_down(trainer, way.slow)
    trainer.add_callback(callback(trainer, lines, warmup=order.warmup, steps=order.steps))
    trainer.train()
    device = torch.cuda.get_device_name() if order.cuda else "CPU"
    about = {**versions(), **_unsloth_version(way)}
    lines.write("done", device=device, versions=about, checkpointing=bool(trainer.args.gradient_checkpointing))


def _unsloth_version(way: Way) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("unsloth", "unsloth_zoo")} if way.name == "unsloth" else {}


def _import(way: Way, order: Order) -> None:
    if way.name == "unsloth":
        import unsloth  # type: ignore[import-not-found,unused-ignore]  # noqa: F401  # patches what is imported later
    elif way.name != "stock":
        import trlpatch

        trlpatch.PatchFastRL("grpo", **way.options)
    import torch
    import vllm  # noqa: F401
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401

    if not order.cuda:
        torch.set_num_threads(1)


def plain_policy(way: Way, order: Order) -> tuple[Any, Any]:
    """Load the model with transformers, give it an adapter, and load the tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    dtype = torch.bfloat16 if order.cuda else torch.float32
    base = AutoModelForCausalLM.from_pretrained(order.model, dtype=dtype)
    if not order.rank:
        return base, AutoTokenizer.from_pretrained(order.model)
    lora = LoraConfig(r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, lora), AutoTokenizer.from_pretrained(order.model)


def _attached(way: Way, order: Order) -> tuple[Any, Any]:
    from vllm import LLM

    import trlpatch

    settings: dict[str, Any] = {
        "enable_lora": True, "max_lora_rank": order.rank, "max_loras": 1, "max_model_len": order.length, "seed": 0,
        "logprobs_mode": "processed_logprobs", "gpu_memory_utilization": order.utilization,
        "enable_sleep_mode": order.sleep, **({} if order.cuda else {"dtype": "float32"}),
    }  # fmt: skip
    engine = LLM(model=order.model, **{**settings, **way.engine})
    policy, words = plain_policy(way, order)
    return trlpatch.attach_engine(policy, engine), words


def _fast(way: Way, order: Order) -> tuple[Any, Any]:
    import trlpatch

    # On CUDA a copy that is not shared would be another way: an error, not a fallback.
    share = False if way.name == "trlpatch-separate" else (True if order.cuda else None)
    settings: dict[str, Any] = {
        "max_seq_length": order.length, "load_in_4bit": False, "gpu_memory_utilization": order.utilization,
        "max_lora_rank": order.rank, "enable_sleep_mode": order.sleep, "share_weights": share,
    }  # fmt: skip
    base, words = trlpatch.FastLanguageModel.from_pretrained(order.model, **{**settings, **way.engine})
    adapted = trlpatch.FastLanguageModel.get_peft_model(
        base, r=order.rank, lora_alpha=order.rank, target_modules=TARGETS
    )
    return adapted, words


def _unsloth(way: Way, order: Order) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found,unused-ignore]

    settings: dict[str, Any] = {
        "max_seq_length": order.length, "load_in_4bit": False, "fast_inference": True, "max_lora_rank": order.rank,
        "gpu_memory_utilization": order.utilization,
    }  # fmt: skip
    base, words = FastLanguageModel.from_pretrained(order.model, **{**settings, **way.engine})
    adapted = FastLanguageModel.get_peft_model(
        base, r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, use_gradient_checkpointing="unsloth"
    )
    return adapted, words


MODELS: dict[str, Callable[[Way, Order], tuple[Any, Any]]] = {
    "stock": plain_policy,
    "drop-in": plain_policy,
    "trlpatch": _fast,
    "trlpatch-separate": _fast,
    "trlpatch-attached": _attached,
    "unsloth": _unsloth,
}


def grpo_trainer(way: Way, order: Order, model: Any, words: Any) -> Any:
    """Build a GRPOTrainer with the settings that all ways share and the way's own."""
    import transformers
    import trl
    from datasets import Dataset

    # Every completion has its full length, so that the ways compute the same amount.
    full_length = {"ignore_eos": True}
    settings: dict[str, Any] = {
        "output_dir": str(Path(order.model) / "out"), "per_device_train_batch_size": order.per_device,
        "gradient_accumulation_steps": order.completions // order.per_device, "num_generations": order.generations,
        "max_completion_length": order.tokens, "max_prompt_length": 64, "max_steps": order.total_steps,
        "learning_rate": order.learning_rate, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 0,
        "report_to": [], "save_strategy": "no", "bf16": order.cuda, "use_cpu": not order.cuda, "disable_tqdm": True,
        "beta": 0.0, "temperature": 1.0, "top_p": 1.0, "use_vllm": True, "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": order.sleep, "vllm_gpu_memory_utilization": order.utilization,
        "vllm_max_model_length": order.length, "generation_kwargs": full_length,
    }  # fmt: skip
    if way.name == "unsloth":
        from unsloth import vLLMSamplingParams  # type: ignore[import-not-found,unused-ignore]

        settings["vllm_sampling_params"] = vLLMSamplingParams(**full_length)
    known = trl.GRPOConfig.__dataclass_fields__
    arguments = {name: value for name, value in settings.items() if name in known or name == "vllm_sampling_params"}
    config = trl.GRPOConfig(**{**arguments, **way.config})
    one_device(config)
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 64}),
        processing_class=words,
        reward_funcs=odd_tokens,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def one_device(config: Any) -> None:
    """Train on the first device alone: without a launcher transformers uses all that are visible, by DataParallel."""
    if config.n_gpu > 1:
        config._n_gpu = 1


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip
"""Of every process that trains or generates."""
ENVIRONMENT_CPU = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}  # fmt: skip


def environment(way: Way, order: Order) -> dict[str, str]:
    """Return the environment variables that the child needs before it imports anything."""
    standby = {"UNSLOTH_VLLM_STANDBY": "1"} if way.name == "unsloth" and order.sleep else {}
    return {**ENVIRONMENT, **({} if order.cuda else ENVIRONMENT_CPU), **standby, **way.env}


def as_json(way: Way, order: Order) -> dict[str, Any]:
    """For the command line of a child."""
    return {"way": way.spec, "order": asdict(order)}
