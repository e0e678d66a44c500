"""One training run in this process: is the policy in every rollout, over sleep, accumulation and evaluation?

Measured is the difference between the log-probability that the engine reports for a token it sampled and the one that
the training model gives it at that moment: the level of rounding if the policy rolls out, far above it if anything
else does. `python -m tests.runs.case --child '{"case": "grpo-lora", ...}'` prints `RESULT <json>`. Cases are
<algorithm>-<kind>:

    lora    LoRA on an attached engine, built with sleep where there is a GPU; then a control on the same engine, with
            the adapter left out of every request
    own     LoRA, TRL builds the engine
    full    all weights, TRL builds the engine, with sleep where TRL has it
    liger   as lora, with Liger's loss
    ddp2    as lora, one of two ranks with an engine each, started with RANK, LOCAL_RANK and WORLD_SIZE set

`stock` runs TRL as it is; it cannot be given an engine, so its lora is own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from tests import ports
from tests.runs.measure import odd_tokens, watch_rollouts
from tests.runs.trainers import ALGORITHMS
from trlpatch.source.locate import find_trl

VERSIONS = ("trl", "vllm", "transformers", "torch", "peft", "accelerate", "liger-kernel")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTROL_STEPS = 6
EVALUATED = 3


@dataclass(frozen=True)
class Order:
    """What to run.

    Attributes:
        case: `<algorithm>-<kind>`.
        model: directory of the checkpoint.
        steps: optimizer steps, each of two accumulated micro-batches.
        stock: TRL without trlpatch.
        control: train again without requests.
        memory: the engine's share of the device.
    """

    case: str
    model: str
    steps: int = 12
    stock: bool = False
    control: bool = True
    memory: float = 0.15

    @property
    def algorithm(self) -> str:
        return self.case.rpartition("-")[0]

    @property
    def kind(self) -> str:
        return self.case.rpartition("-")[2]

    @property
    def attached(self) -> bool:
        return self.kind in ("lora", "liger", "ddp2") and not self.stock


@dataclass
class Counts:
    """What was asked of vLLM."""

    engines: int = 0
    sleeps: list[int] = field(default_factory=list)
    wakes: int = 0
    reloads: int = 0


def run(order: Order) -> dict[str, Any]:
    """Train as ordered; the result is JSON-able."""
    started = time.monotonic()
    counts = watch_engines()
    if not order.stock:
        import trlpatch

        trlpatch.PatchFastRL(order.algorithm)
    with tempfile.TemporaryDirectory() as directory:
        if "WORLD_SIZE" in os.environ:
            from accelerate import PartialState

            PartialState()
        training = Training(order, Path(directory))
        trainer = training.start(training.engine() if order.attached else None)
        ready = time.monotonic()
        trainer.train()
        trained = len(training.gaps)
        if training.evaluates:
            trainer.evaluate()
        result: dict[str, Any] = {
            **asdict(counts),
            "gaps": list(training.gaps),  # the comparison of the engine with the control's model adds another
            "eval_rollouts": len(training.gaps) - trained,
            "rewards": training.rewards,
            "weights": digest(trainer.model),
            "seconds_to_start": ready - started,
            "seconds_to_train": time.monotonic() - ready,
        }
        if order.attached and order.control:
            result["control"] = control(order, trainer.model.vllm_engine, Path(directory))
    result["versions"] = versions()
    result["seconds"] = time.monotonic() - started
    return result


def control(order: Order, engine: Any, directory: Path) -> list[float]:
    """The gaps of a training whose rollouts get no request."""
    import trlpatch.hooks
    from trlpatch.engine.state import state_of

    live = trlpatch.hooks.lora_request
    # The hook also wakes the engine; only what it returns is left out.
    trlpatch.hooks.lora_request = lambda *given: live(*given) and None
    try:
        engine.wake_up()
        training = Training(order, directory)
        trainer = training.start(engine, steps=CONTROL_STEPS)
        state_of(engine).bare_request = None  # the guard of requests that name no adapter
        trainer.train()
    finally:
        trlpatch.hooks.lora_request = live
    return training.gaps


class Training:
    """One trainer, with what its rollouts and rewards were."""

    def __init__(self, order: Order, directory: Path) -> None:
        import torch

        self.order = order
        self.directory = directory
        self.algorithm = ALGORITHMS[order.algorithm]
        self.on_gpu = torch.cuda.is_available()
        self.gaps: list[float] = []
        self.rewards: list[float] = []
        self.evaluates = order.algorithm in ("grpo", "rloo") and order.kind != "own"

    def start(self, engine: Any, steps: int | None = None) -> Any:
        """Build the trainer; `engine` is attached to its model."""
        from transformers import AutoTokenizer

        policy = self.policy()
        if engine is not None:
            import trlpatch

            trlpatch.attach_engine(policy, engine)
        trainer_class, config_class = self.algorithm.classes()
        data = self.algorithm.dataset()
        given: dict[str, Any] = dict(self.algorithm.given)
        if self.algorithm.name == "online_dpo" and find_trl().release < (0, 23):
            given["judge"] = Judge(self._reward)
        elif self.algorithm.rewarded:
            given["reward_funcs"] = self._reward
        if self.algorithm.taught:
            given["teacher_model"] = self._teacher()
        if self.evaluates:
            given["eval_dataset"] = data.select(range(EVALUATED))
        trainer = trainer_class(
            model=policy,
            args=self.config(config_class, steps or self.order.steps),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(self.order.model),
            **given,
        )
        watch_rollouts(trainer, engine_of(trainer), self.gaps)
        return trainer

    def policy(self) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = self._load()
        if self.order.kind == "full":
            return model
        settings = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        return get_peft_model(model, settings)

    def engine(self) -> Any:
        from vllm import LLM

        rank = int(os.environ.get("RANK", "0"))
        # One engine for each of several ranks: vLLM then takes the process group that accelerate has made.
        launched = {"distributed_executor_backend": "external_launcher"} if "WORLD_SIZE" in os.environ else {}
        on_gpu = {"enable_sleep_mode": True, "gpu_memory_utilization": self.order.memory}
        on_cpu = {"dtype": "float32"}
        return LLM(
            model=self.order.model,
            enable_lora=True,
            max_lora_rank=8,
            max_loras=1,
            max_model_len=256,
            max_num_seqs=32,
            logprobs_mode="processed_logprobs",
            seed=rank,
            **launched,
            **(on_gpu if self.on_gpu else on_cpu),
        )

    def config(self, cls: Any, steps: int) -> Any:
        """The config, with those of our settings that the release knows."""
        settings: dict[str, Any] = {
            "output_dir": str(self.directory), "per_device_train_batch_size": 16, "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": steps,
            "learning_rate": 1e-4 if self.order.kind == "full" else 4e-3, "lr_scheduler_type": "constant",
            "logging_steps": 1, "seed": 0, "report_to": [], "save_strategy": "no", "bf16": self.on_gpu,
            "use_cpu": not self.on_gpu, "gradient_checkpointing": False, "disable_tqdm": True, "beta": 0.0,
            "vllm_gpu_memory_utilization": self.order.memory, "max_completion_length": 24, "max_new_tokens": 24,
            "max_length": 128, "max_prompt_length": 64, "use_vllm": True, "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": self.on_gpu, "vllm_max_model_length": 256, "temperature": 1.0, "top_p": 1.0,
            "vllm_importance_sampling_correction": False,
            "use_liger_loss" if "use_liger_loss" in cls.__dataclass_fields__ else "use_liger_kernel":
                self.order.kind == "liger",
            **dict(self.algorithm.settings),
        }  # fmt: skip
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in settings.items() if name in known})

    def _load(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        return AutoModelForCausalLM.from_pretrained(self.order.model, torch_dtype=dtype)

    def _teacher(self) -> Any:
        """Surer of everything than the policy at its start, which would have nothing to learn from itself."""
        import torch

        teacher = self._load()
        with torch.no_grad():
            teacher.lm_head.weight.mul_(2.0)
        return teacher

    def _reward(self, *args: Any, **columns: Any) -> list[float]:
        rewards = odd_tokens(*args, **columns)
        self.rewards.append(mean(rewards))
        return rewards


class Judge:
    """What OnlineDPO takes below 0.23 instead of reward functions: the better rewarded of two wins."""

    def __init__(self, reward: Callable[..., list[float]]) -> None:
        self.reward = reward

    def judge(self, prompts: list[Any], completions: list[tuple[str, str]]) -> list[int]:
        return [int(first < second) for first, second in (self.reward(completions=pair) for pair in completions)]


def digest(model: Any) -> str:
    """A hash of the trainable weights: ranks that trained together have the same."""
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            found.update(parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def engine_of(trainer: Any) -> Any:
    """Where TRL keeps it: on the trainer up to 0.27 (GOLD under a name of its own), then in its VLLMGeneration."""
    if hasattr(trainer, "vllm_generation"):
        return trainer.vllm_generation.llm
    return trainer.llm if hasattr(trainer, "llm") else trainer.vllm_engine


def watch_engines() -> Counts:
    """Count what is asked of vLLM, and build every engine eagerly."""
    import vllm

    counts, llm = Counts(), vllm.LLM
    construct, sleep, wake, remote = llm.__init__, llm.sleep, llm.wake_up, llm.collective_rpc

    def constructed(engine: Any, *args: Any, **kwargs: Any) -> None:
        counts.engines += 1
        construct(engine, *args, **{"enforce_eager": True, **kwargs})

    def slept(engine: Any, level: int = 1, **kwargs: Any) -> Any:
        counts.sleeps.append(level)
        return sleep(engine, level=level, **kwargs)

    def woken(engine: Any, *args: Any, **kwargs: Any) -> Any:
        counts.wakes += 1
        return wake(engine, *args, **kwargs)

    def called(engine: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        counts.reloads += method == "reload_weights"
        return remote(engine, method, *args, **kwargs)

    llm.__init__, llm.sleep, llm.wake_up, llm.collective_rpc = constructed, slept, woken, called
    return counts


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(words: list[str]) -> None:
    order = Order(**json.loads(words[-1]))
    if find_trl().release < (0, 20) and not order.attached:  # these leave it to a launcher
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.update({**ports.environment(), **rank, **os.environ})
    print("RESULT " + json.dumps(run(order)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
