"""Notebooks on a GPU: what the CPU cannot do, on the tiny model, with the hooks and checks of tests/cpu."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpu.scenarios import report_of

pytestmark = pytest.mark.gpu


def test_qlora_rolls_out_with_the_adapter_of_its_step(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    report = report_of("tests.cpu.notebook_runs", ["grpo_4bit"], [], tmp_path / "report.json")
    rollouts = [rollout for rollout in report["rollouts"] if rollout["step"] is not None]
    assert report["patched"]
    assert report["engines_built"] == 1
    assert report["steps"] == len(report["rewards"]) == 3
    assert all(rollout["adapters"] != ["None"] for rollout in rollouts)
    assert len({adapter for rollout in rollouts for adapter in rollout["adapters"]}) > 1
    assert report["moved"] > 1e-3
    assert "lora/adapter_model.safetensors" in report["files"]


def test_full_finetuning_pushes_its_weights(tmp_path: Path) -> None:
    report = report_of("tests.cpu.notebook_runs", ["full_finetuning"], [], tmp_path / "report.json")
    rollouts = [rollout for rollout in report["rollouts"] if rollout["step"] is not None]
    assert report["engines_built"] == 1
    assert {rollout["step"] for rollout in rollouts} == {0, 1, 2}
    assert all(rollout["adapters"] == ["None"] for rollout in rollouts)
    assert report["moved"] > 1e-3
