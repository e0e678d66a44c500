"""A model id and a `peft_config`, with an engine that TRL builds, on a real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpu.scenarios import report_of

pytestmark = [pytest.mark.cpu, pytest.mark.release]


def test_trl_loads_the_model_and_each_rollout_has_the_adapter_of_its_step(tmp_path: Path) -> None:
    report = report_of("tests.cpu.model_ids", [], [], tmp_path / "report.json")
    assert report["model"].startswith("Peft")
    (built,) = report["built_with"]
    assert (built["enable_lora"], built["max_lora_rank"]) == (True, 8)
    _, *moved = report["rollouts"]
    assert len(moved) == 3
    assert len({rollout["adapter"] for rollout in report["rollouts"]} - {None}) == 4
    # vLLM turns a float32 checkpoint into bfloat16, and TRL does not tell it otherwise.
    assert max(rollout["gap"] for rollout in report["rollouts"]) < 0.1
    assert min(rollout["of_base"] for rollout in moved) > 0.2, "the base model would have sampled otherwise"
