"""Train a few steps with `old_logps="stock"` or `"reuse"` and report every number to the last bit.

    python -m tests.cpu.old_logps_runs OUT.json --old-logps reuse

Runs on one attached engine, which samples at another temperature than the trainer scores at: without that, both sides
would agree and the importance sampling ratio would be 1.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.cpu.training import configured, engine_of, odd_tokens
from trlpatch.source.locate import find_trl

STEPS = 5
TEMPERATURE = 1.5
MAX_COMPLETION = 12

MODE = "vllm_importance_sampling_mode"
BOUNDS = {
    "vllm_importance_sampling_cap": 1.2,
    "vllm_importance_sampling_clip_max": 1.2,
    "vllm_importance_sampling_clip_min": 0.8,
}

GRPO: dict[str, dict[str, Any]] = {
    "token_truncate": {MODE: "token_truncate"},
    "token_mask": {MODE: "token_mask"},
    "sequence_truncate": {MODE: "sequence_truncate"},
    "sequence_mask": {MODE: "sequence_mask"},
    "kl": {MODE: "token_truncate", "beta": 0.1},
    "bf16": {MODE: "token_truncate", "bf16": True},
    "two_batches_a_step": {MODE: "token_truncate", "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "two_iterations_a_step": {
        MODE: "token_truncate",
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "num_iterations": 2,
    },
    "checkpointing": {MODE: "token_truncate", "gradient_checkpointing": True},
}
"""Reused: config fields over GRPO's common ones."""

KEPT: dict[str, dict[str, Any]] = {
    "iterations": {"num_iterations": 2},
    "steps_per_generation": {"steps_per_generation": 4},
    "lora_dropout": {},
    "attention_dropout": {"disable_dropout": True},
    "subclass": {},
    "rloo_beta": {"beta": 0.05},
}
"""Not reused, each for another reason."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--old-logps", choices=["stock", "reuse"], required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Runs(Path(directory), arguments.old_logps).all()
    arguments.out.write_text(json.dumps(report, indent=1))


class Runs:
    """Every run, on the one engine of this process."""

    def __init__(self, directory: Path, old_logps: Any) -> None:
        import trlpatch

        self.report = trlpatch.PatchFastRL(old_logps=old_logps)
        self.directory = directory
        self.checkpoint = tiny.checkpoint(directory / "model")
        self.engine = tiny.engine(self.checkpoint)

    def all(self) -> dict[str, Any]:
        release = find_trl().release
        runs: dict[str, Callable[[], dict[str, Any]]] = {}
        if release >= (0, 23):
            runs |= {name: self._grpo(**config) for name, config in GRPO.items()}
            kept = {name: config for name, config in KEPT.items() if name != "rloo_beta"}
            runs |= {name: self._grpo(name, **config) for name, config in kept.items()}
        if release >= (0, 27, 1):
            runs["off_policy_mask"] = self._grpo(off_policy_mask_threshold=0.01, **{MODE: "token_truncate"})
        if release >= (1, 0):
            runs["vespo"] = self._grpo(loss_type="vespo", **{MODE: "token_truncate"})
        if release >= (0, 28):
            runs["env_mask"] = self._grpo("env_mask", **{MODE: "token_truncate"})
        runs |= {"rloo": self._rloo(beta=0.0), "rloo_beta": self._rloo(**KEPT["rloo_beta"])}
        return {name: run() for name, run in runs.items()}

    def _grpo(self, kind: str = "", **config: Any) -> Callable[[], dict[str, Any]]:
        return lambda: self._run("GRPO", kind, config)

    def _rloo(self, **config: Any) -> Callable[[], dict[str, Any]]:
        return lambda: self._run("RLOO", "", config)

    def _run(self, algorithm: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
        import torch
        import trl
        from transformers import PrinterCallback

        import trlpatch

        torch.manual_seed(0)
        model = tiny.policy(self.checkpoint, lora_dropout=0.1 if kind == "lora_dropout" else 0.0)
        if kind == "attention_dropout":
            for module in model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.1
        settings: dict[str, Any] = {
            "output_dir": str(self.directory / "out"),
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": MAX_COMPLETION,
            "max_steps": STEPS,
            "vllm_sampling_params": {"temperature": TEMPERATURE},
            **BOUNDS,
            **config,
        }
        cls = getattr(trl, f"{algorithm}Trainer")
        trainer = (subclass_of(cls) if kind == "subclass" else cls)(
            model=trlpatch.attach_engine(model, self.engine),
            args=configured(getattr(trl, f"{algorithm}Config"), settings),
            reward_funcs=odd_tokens,
            train_dataset=tiny.dataset(32),
            processing_class=tiny.tokenizer(),
            **({"rollout_func": masked_rollout} if kind == "env_mask" else {}),
        )
        trainer.remove_callback(PrinterCallback)
        recorder = Recorder(trainer)
        trainer.train()
        (status,) = [line for line in self.report.old_logps if line.startswith(type(trainer).__name__)] or [""]
        return {**recorder.found(), "status": status}


def subclass_of(cls: Any) -> Any:
    """Make a trainer class with a loss method of its own, which calls TRL's."""

    def _compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls._compute_loss(self, *args, **kwargs)

    return type("OwnTrainer", (cls,), {"_compute_loss": _compute_loss})


def masked_rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Roll out on the trainer's engine, and call every third token an answer of the environment."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_COMPLETION, logprobs=0)
    outputs = engine_of(trainer).generate(prompts, params, use_tqdm=False)
    completions = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "prompt_ids": [output.prompt_token_ids for output in outputs],
        "completion_ids": completions,
        "logprobs": [tiny.engine_logprobs(output).tolist() for output in outputs],
        "env_mask": [[int(place % 3 != 2) for place in range(len(ids))] for ids in completions],
    }


class Recorder:
    """Losses, gradients and weights of a training, and the forward passes without gradients of each step."""

    def __init__(self, trainer: Any) -> None:
        import torch
        from transformers import TrainerCallback

        self._trainer = trainer
        self.losses: list[str] = []
        self.gradients: list[str] = []
        self.passes: dict[int, int] = dict.fromkeys(range(STEPS), 0)
        step = trainer.training_step

        def recording(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self.losses.append(float(loss).hex())
            return loss

        def counting(*_: Any) -> None:
            if not torch.is_grad_enabled():
                self.passes[trainer.state.global_step] += 1

        class Gradients(TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: N805
                self.gradients.append(digest(p.grad for p in trainer.model.parameters() if p.grad is not None))

        trainer.training_step = recording
        trainer.add_callback(Gradients())
        trainer.model.register_forward_pre_hook(counting)

    def found(self) -> dict[str, Any]:
        """Return all of it, and what the trainer logged."""
        logs = [entry for entry in self._trainer.state.log_history if "loss" in entry]
        return {
            "losses": self.losses,
            "gradients": self.gradients,
            "passes": list(self.passes.values()),
            "weights": digest(self._trainer.model.parameters()),
            "logs": [{name: entry[name] for name in sorted(entry) if name not in TIMED} for entry in logs],
        }


TIMED = ("step_time", "total_flos")


def digest(tensors: Iterable[Any]) -> str:
    """Return a digest of every bit of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
