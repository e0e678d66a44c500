"""Train the tiny model with stock `trl.GRPOTrainer` in a patched process."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.demo import tiny
from trlpatch.errors import DemoNeedsPackages, InvalidOption
from trlpatch.versions import installed_version, pip_install

if TYPE_CHECKING:
    from trlpatch.runtime.report import PatchReport

NEEDED = ("trl", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers")
REWARD = "share of a completion's characters that are digits"

COMPLETION_TOKENS = 16
GENERATIONS = 8
PROMPTS_PER_STEP = 8


@dataclass(frozen=True)
class Setting:
    """What is known before the first step.

    Attributes:
        report: what `PatchFastRL` did.
        rollouts: who generates, in words.
        versions: of the packages that matter here.
        trainable: number of LoRA parameters.
    """

    report: PatchReport
    rollouts: str
    versions: dict[str, str]
    trainable: int


@dataclass(frozen=True)
class Result:
    """A finished demo; `rewards` holds the mean reward of every step."""

    setting: Setting
    rewards: tuple[float, ...]
    seconds: float


def digits(completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of digits among the characters that are no spaces."""
    letters = ["".join(text.split()) for text in completions]
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in letters]


def train(
    steps: int,
    seed: int,
    on_start: Callable[[Setting], None],
    on_step: Callable[[int, float], None],
    out: Path | None = None,
) -> Result:
    """Train `steps` steps, telling `on_start` once and `on_step` (number, mean reward) as they happen.

    Args:
        out: an empty or new directory that keeps the base model in `model` and what was trained in `adapter`.

    Raises:
        DemoNeedsPackages: a package of the demo extra is not installed.
        InvalidOption: there is something in `out`.
    """
    _require_packages()
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise InvalidOption(f"trlpatch demo --out {out}: expected an empty or new directory, found files in it")
    # Set before torch and transformers are imported: no hub, no telemetry, one device, an engine in this process.
    # More threads gain nothing on matrices this small, and wait for each other when another process has a core.
    for name, value in {
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    with _quiet(), tempfile.TemporaryDirectory(prefix="trlpatch-demo-") as scratch:
        return _train(steps, seed, on_start, on_step, (out or Path(scratch)).resolve(), keep=out is not None)


def _train(
    steps: int,
    seed: int,
    on_start: Callable[[Setting], None],
    on_step: Callable[[int, float], None],
    directory: Path,
    *,
    keep: bool,
) -> Result:
    import trlpatch

    report = trlpatch.PatchFastRL("GRPO")

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import GRPOConfig, GRPOTrainer

    disable_progress_bar()
    tokens = tiny.tokenizer()
    base = tiny.model(tokens, seed)
    tiny.save(base, tokens, directory / "model")
    base.name_or_path = str(directory / "model")  # where an adapter says that its base model is
    model = tiny.with_lora(base)
    rollouts = _attach(model, directory / "model", seed)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    setting = Setting(report, rollouts, _versions(), trainable)
    on_start(setting)

    class Rewards(TrainerCallback):  # type: ignore[misc]
        """Collects the reward of every step."""

        seen: list[float] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "reward" in logs:
                self.seen.append(logs["reward"])
                on_step(state.global_step, logs["reward"])

    rewards = Rewards()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=digits,
        args=GRPOConfig(
            output_dir=str(directory / "adapter"),
            max_steps=steps,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PROMPTS_PER_STEP * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=COMPLETION_TOKENS,
            beta=0.0,
            seed=seed,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": tiny.corpus(PROMPTS_PER_STEP * steps, seed + 1)}),
        processing_class=tokens,
        callbacks=[rewards],
    )
    _drop_printing_callbacks(trainer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    if keep:
        trainer.save_model()
    return Result(setting, tuple(rewards.seen), seconds)


def _attach(model: Any, directory: Path, seed: int) -> str:
    """Attach a vLLM engine to `model` if vLLM can be imported; return who generates, in words."""
    if importlib.util.find_spec("vllm") is None:
        return "transformers, because vLLM is not installed; with it, the same trainer uses an attached engine"
    try:
        from vllm import LLM
    except ImportError as error:
        return f"transformers, because vLLM cannot be imported: {error}"
    import trlpatch

    engine = LLM(
        model=str(directory),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        max_loras=1,
        max_model_len=128,
        max_num_seqs=PROMPTS_PER_STEP * GENERATIONS,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        seed=seed,
    )
    trlpatch.attach_engine(model, engine)
    return "vLLM engine in this process, attached to the model, with the live adapter in every request"


def _require_packages() -> None:
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise DemoNeedsPackages(
            f"trlpatch demo needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed. "
            f"Run: {pip_install('demo')}"
        )


def _versions() -> dict[str, str]:
    names = ("trl", "torch", "transformers", "peft", "vllm")
    return {name: version for name in names if (version := installed_version(name)) is not None}


def _drop_printing_callbacks(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep other people's deprecation warnings and start-up logs off the demo's screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
