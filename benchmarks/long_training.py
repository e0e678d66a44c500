"""The two processes of a long run: one that trains and is disturbed, one that resumes from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.long_samples import Sampler
from benchmarks.step_timers import Lines
from tests.runs.case import TARGETS, versions
from tests.runs.measure import odd_tokens
from tests.runs.trainers import PROMPTS

INTO_ROLLOUT = 5
"""Steps of the engine after which a rollout is interrupted: prompts are in, completions are not."""


@dataclass(frozen=True)
class Order:
    """What to run.

    Attributes:
        model: directory of the checkpoint that is trained.
        out: directory of the trainer's checkpoints, and of the token ids of rollouts right after one was saved.
        steps: optimizer steps, an evaluation every `eval_every` of them and a checkpoint every `save_every`.
        interrupt, fail: the steps in which the rollout is interrupted and the reward function raises.
        seconds: training ends after so many, whatever `steps` says.
    """

    model: str
    out: str
    steps: int
    eval_every: int
    save_every: int
    interrupt: int
    fail: int
    tokens: int
    completions: int
    generations: int
    rank: int
    seconds: float
    cuda: bool
    eager: bool

    def as_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    def rollout_file(self, step: int, attempt: str) -> Path:
        """Where the token ids of the rollout after `step` steps are."""
        return Path(self.out) / f"rollout-{step}-{attempt}.json"


class Failed(Exception):
    """The reward function's error, raised on purpose."""


def train(order: Order, lines: Lines) -> None:
    """Train all steps; after each disturbance go on from the last checkpoint, in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    model, words = _policy(order)
    trouble = Trouble(order)
    engine = model.vllm_engine
    trouble.watch(engine)
    sampler = Sampler(engine)
    progress = Progress(sampler)
    trainer = _trainer(order, model, words, trouble, lines, progress)
    lines.write("started", versions=versions(), device=_device(order))
    for disturbed in (KeyboardInterrupt, Failed, None):
        resume = _last_checkpoint(Path(order.out))
        trouble.attempt = f"resumed-{resume.name}" if resume else "first"
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except (KeyboardInterrupt, Failed) as error:
            lines.write("disturbed", kind=type(error).__name__, step=trainer.state.global_step)
            if not isinstance(error, disturbed or ()):
                raise
        else:
            if disturbed is not None and progress.seconds < order.seconds:
                raise RuntimeError(f"training went on: expected {disturbed.__name__} at a step before {order.steps}")
            break
        if disturbed is Failed:  # the first time the same trainer goes on, the second time another one
            trainer = _trainer(order, model, words, trouble, lines, progress)
    sampler.mark()
    lines.write("done", step=trainer.state.global_step, grown=sampler.grown, seconds=progress.seconds)


def resume(order: Order, checkpoint: Path, lines: Lines) -> None:
    """Roll out once from a checkpoint, in a process that has trained nothing."""
    model, words = _policy(order)
    trouble = Trouble(order)
    trouble.watch(model.vllm_engine)
    trouble.attempt, trouble.armed = "new-process", False
    trainer = _trainer(order, model, words, trouble, lines, None)
    trainer.add_callback(_stop_after_a_step())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    lines.write("resumed", step=trainer.state.global_step)


class Trouble:
    """Interrupts one rollout, fails one reward, and notes the token ids of rollouts right after a checkpoint."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.attempt = ""
        self.armed = True
        self.trainer: Any = None
        self._engine_steps = 0
        self._done: set[str] = set()

    def watch(self, engine: Any) -> None:
        """See every rollout and every step of the engine."""
        step, generate = engine.llm_engine.step, engine.generate

        def stepping() -> Any:
            answers = step()
            self._engine_steps += 1
            if self._now("interrupt") and self._engine_steps == INTO_ROLLOUT:
                self._done.add("interrupt")
                os.kill(os.getpid(), signal.SIGINT)
            return answers

        def generating(*given: Any, **named: Any) -> Any:
            self._engine_steps = 0
            outputs = generate(*given, **named)
            at = self.trainer.state.global_step
            if self.trainer.model.training and at and at % self.order.save_every == 0:
                request = named["lora_request"]
                tokens = [[list(out.prompt_token_ids), list(out.outputs[0].token_ids)] for out in outputs]
                text = json.dumps({"adapter": request.lora_name.startswith("trlpatch"), "tokens": tokens})
                self.order.rollout_file(at, self.attempt).write_text(text, encoding="utf-8")
            return outputs

        engine.llm_engine.step, engine.generate = stepping, generating

    def reward(self, **given: Any) -> list[float]:
        """Reward odd tokens; fail once."""
        if self._now("fail"):
            self._done.add("fail")
            raise Failed("the reward function failed on purpose")
        return odd_tokens(**given)

    def _now(self, kind: str) -> bool:
        at = self.order.interrupt if kind == "interrupt" else self.order.fail
        training = self.trainer.model.training and self.trainer.state.global_step == at
        return self.armed and kind not in self._done and training


class Progress:
    """How far all trainers of this process together are.

    Attributes:
        trained: steps, those that were trained again after a disturbance included.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.trained = 0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the first trainer was about to be built."""
        return time.perf_counter() - self._started


def _callback(order: Order, lines: Lines, progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spent = {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}
            progress.trained += 1
            sample = progress.sampler.sample(progress.trained)
            lines.write("step", sample={**sample, **spent, "trained": progress.trained, "step": state.global_step})
            if progress.trained == order.steps // 3:
                progress.sampler.mark()
            if progress.seconds > order.seconds:
                control.should_save = control.should_training_stop = True

    return Watch()


def _stop_after_a_step() -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False

    return Stop()


def _policy(order: Order) -> tuple[Any, Any]:
    """Return the model with a fresh adapter on an engine of its own, and the tokenizer; patches TRL."""
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    length = order.tokens + 64
    if order.cuda:
        base, words = trlpatch.FastLanguageModel.from_pretrained(
            order.model, max_seq_length=length, load_in_4bit=False, gpu_memory_utilization=0.15,
            max_lora_rank=order.rank, enable_sleep_mode=True, share_weights=True, max_num_seqs=order.completions,
            enforce_eager=order.eager,
        )  # fmt: skip
        torch.manual_seed(0)
        adapted = trlpatch.FastLanguageModel.get_peft_model(
            base, r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, use_gradient_checkpointing=False
        )
        return adapted, words
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    engine = LLM(
        model=order.model, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=order.rank,
        max_loras=1, max_model_len=length, max_num_seqs=order.completions, logprobs_mode="processed_logprobs", seed=0,
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(order.model, dtype=torch.float32)
    lora = LoraConfig(r=order.rank, lora_alpha=order.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    policy = trlpatch.attach_engine(get_peft_model(base, lora), engine)
    return policy, AutoTokenizer.from_pretrained(order.model)


def _trainer(order: Order, model: Any, words: Any, trouble: Trouble, lines: Lines, progress: Progress | None) -> Any:
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    # One epoch: TRL 1.16.0's RepeatSampler starts from its seed again when training resumes, so that from the second
    # epoch on a resumed run sees other prompts than one that was not interrupted.
    rows = 2 * order.steps * order.completions // order.generations
    settings: dict[str, Any] = {
        "output_dir": order.out, "max_steps": order.steps, "per_device_train_batch_size": order.completions,
        "per_device_eval_batch_size": order.completions, "num_generations": order.generations,
        "max_completion_length": order.tokens, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "beta": 0.0,
        "logging_steps": 1, "seed": 0, "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False,
        "eval_strategy": "steps", "eval_steps": order.eval_every, "save_strategy": "steps",
        "save_steps": order.save_every, "bf16": order.cuda, "use_cpu": not order.cuda,
        "vllm_enable_sleep_mode": order.cuda,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=GRPOConfig(**settings), reward_funcs=trouble.reward,
        train_dataset=Dataset.from_dict({"prompt": (PROMPTS * rows)[:rows]}), processing_class=words,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[: order.completions // order.generations]}),
        callbacks=[_callback(order, lines, progress)] if progress else [],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trouble.trainer = trainer
    return trainer


def _last_checkpoint(folder: Path) -> Path | None:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def _device(order: Order) -> str:
    import torch

    return torch.cuda.get_device_name() if order.cuda else "CPU"
