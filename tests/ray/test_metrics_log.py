"""What engines do is in the log of a transformers trainer, and everything that reports sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.torch


def test_a_trainer_logs_what_the_monitor_saw(tmp_path: Path) -> None:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

    from trlpatch.ray.messages import EngineHealth, Version
    from trlpatch.ray.metrics import EngineMonitor, log_with

    class Model(PreTrainedModel):  # type: ignore[misc]
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.ones(1))

    class Reports(TrainerCallback):  # type: ignore[misc]
        seen: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.seen.append(dict(logs))

    class Engines:
        adapter_version, adapter_bytes, sync_seconds = 1, 2**20, 0.01
        handles = (0,)

        def health(self, timeout: float | None = None) -> list[Any]:
            return [EngineHealth(0, "running", 7, 1, Version(1), 3, 0.0, 10)]

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=Model(PretrainedConfig()), args=arguments, callbacks=[Reports()])
    engines = Engines()
    monitor = EngineMonitor(engines)  # type: ignore[arg-type]
    log_with(trainer, monitor)
    assert monitor.look() is not None
    trainer.log({"loss": 1.0})
    assert Reports.seen[-1]["ray/queue_depth"] == 7.0
    assert trainer.state.log_history[-1]["ray/queue_depth"] == 7.0
    assert trainer.state.log_history[-1]["loss"] == 1.0
    trainer.log({"loss": 1.0, "num_steps_off_policy": 1.5})
    assert monitor.look() is not None
    assert monitor.figures.staleness == 1.5
    trainer.log({"eval_loss": 1.0})
    assert set(trainer.state.log_history[-1]) >= {"eval_loss"}
    assert not any(name.startswith("ray/") for name in trainer.state.log_history[-1])
