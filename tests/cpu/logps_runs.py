"""Train a few steps with `logps="stock"` or `"chunked"` and report every number to the last bit.

    python -m tests.cpu.logps_runs OUT.json --logps chunked

A batch has at most 96 tokens here, and a chunk 24 or fewer.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.cpu.old_logps_runs import MAX_COMPLETION, Recorder
from tests.cpu.training import configured, odd_tokens
from trlpatch.source.locate import find_trl

STEPS = 3
CHUNK = 24

GRPO: dict[str, dict[str, Any]] = {
    "grpo": {},
    "kl": {"beta": 0.1},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "slices": {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "entropy_quantile": {"top_entropy_quantile": 0.5},
    "entropy_bonus": {"entropy_coef": 0.1},
    "temperature_one": {"temperature": 1.0},
}
"""Config fields over GRPO's common ones; a release without one trains as without it."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--logps", choices=["stock", "chunked"], required=True)
    parser.add_argument("--old-logps", choices=["stock", "reuse"], default="stock")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Runs(Path(directory), arguments.logps, arguments.old_logps).all()
    arguments.out.write_text(json.dumps(report, indent=1))


class Runs:
    """Every run, on the one engine of this process."""

    def __init__(self, directory: Path, logps: Any, old_logps: Any) -> None:
        import trlpatch
        from trlpatch.policy import deferred_logits

        self.report = trlpatch.PatchFastRL(logps=logps, old_logps=old_logps)
        self.directory = directory
        self.checkpoint = tiny.checkpoint(directory / "model")
        self.engine = tiny.engine(self.checkpoint)
        deferred_logits.CHUNK_ELEMENTS = CHUNK * len(tiny.tokenizer())

    def all(self) -> dict[str, Any]:
        runs = {name: self._run("GRPO", config) for name, config in GRPO.items()}
        if find_trl().release >= (0, 22):
            runs["rloo"] = self._run("RLOO", {"beta": 0.05})
        return runs

    def _run(self, algorithm: str, config: dict[str, Any]) -> dict[str, Any]:
        import torch
        import trl
        from transformers import PrinterCallback

        import trlpatch

        torch.manual_seed(0)
        model = tiny.policy(self.checkpoint)
        settings: dict[str, Any] = {
            "output_dir": str(self.directory / "out"),
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "max_completion_length": MAX_COMPLETION,
            "max_steps": STEPS,
            "temperature": 0.8,
            **config,
        }
        trainer = getattr(trl, f"{algorithm}Trainer")(
            model=trlpatch.attach_engine(model, self.engine),
            args=configured(getattr(trl, f"{algorithm}Config"), settings),
            reward_funcs=odd_tokens,
            train_dataset=tiny.dataset(32),
            processing_class=tiny.tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        recorder = Recorder(trainer)
        trainer.train()
        (status,) = [line for line in self.report.logps if line.startswith(type(trainer).__name__)] or [""]
        return {**recorder.found(), "status": status}


if __name__ == "__main__":
    main()
