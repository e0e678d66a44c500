"""FastVisionModel on a real vLLM CPU engine: the engine samples from the policy that is trained, with its pixels."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.cpu.vision_training import RLOO_SINCE
from trlpatch.source.locate import find_trl
from trlpatch.versions import installed_version

ROOT = Path(__file__).resolve().parents[2]
TORCHVISION = os.environ.get("TRLPATCH_TEST_VISION", "")  # set by tests/cpu/stack.py
TOLERANCE = 1e-4  # float32 on both sides
MOVED = 1e-2
LANGUAGE = sorted(
    f"model.language_model.layers.0.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"
    for name in tiny.TARGETS
)
TOWER = ["attn.proj", "attn.qkv", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
CAUSAL_IMAGES = 1e-2
"""vLLM's CPU attention is causal within an image of Gemma 3, where transformers' is not."""


@pytest.mark.cpu
@pytest.mark.release
def test_grpo_trains_on_what_was_sampled_with_the_image(tmp_path: Path) -> None:
    if find_trl().release < (0, 20):
        pytest.skip("GRPO has no images below 0.20")
    if find_trl().release < (0, 29, 1) and str(installed_version("transformers")).startswith("5."):
        pytest.skip(
            "TRL below 0.29.1 gives transformers 5 mm_token_type_ids of the prompt alone, and its forward fails"
        )
    report = _run("grpo", tmp_path)
    assert report["uses_ours"]
    assert report["adapted"] == LANGUAGE
    assert [one["call"] for one in report["rollouts"]] == 2 * ["chat" if _messages() else "generate"]
    assert len({one["adapter"] for one in report["rollouts"]} - {None}) == 2, "the second is of a trained adapter"
    assert max(one["gap"] for one in report["rollouts"]) < TOLERANCE
    assert report["gap"] < TOLERANCE
    assert min(report["gap_without_adapter"], report["gap_of_other_image"]) > MOVED
    if find_trl().release >= RLOO_SINCE:
        (rollout,) = report["rloo"]["rollouts"]
        assert report["rloo"]["uses_ours"]
        assert rollout["adapter"]
        assert rollout["gap"] < TOLERANCE
        assert min(rollout["without_adapter"], rollout["of_other_image"]) > MOVED
    exports = report["exports"]
    assert max(exports[way] for way in ("live", "unnamed", "adapter")) < TOLERANCE
    assert exports["base"] > MOVED
    assert "would hold the language model alone" in exports["gguf"]


def _messages() -> bool:
    return (0, 25) <= find_trl().release < (0, 29, 1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    if find_trl().release < (0, 29):
        pytest.skip("the tiny Qwen3-VL and Gemma 3 are made for transformers 5")
    return _run("kinds", tmp_path_factory.mktemp("kinds"))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("qwen2_5_vl", TOLERANCE), ("qwen3_vl", TOLERANCE), ("gemma3", CAUSAL_IMAGES)]
)
def test_rollouts_carry_the_adapter_and_the_image(
    kinds: dict[str, dict[str, Any]], kind: str, tolerance: float
) -> None:
    report = kinds[kind]
    assert report["gap"] < tolerance
    assert min(report["gap_without_adapter"], report["gap_of_other_image"]) > 10 * tolerance
    assert set(report["adapted"]) >= set(LANGUAGE)


@pytest.mark.cpu
def test_the_tower_is_adapted_where_the_engine_can(kinds: dict[str, dict[str, Any]]) -> None:
    tower = [f"model.visual.blocks.0.{name}" for name in TOWER]
    merger = ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]
    assert kinds["qwen2_5_vl"]["adapted"] == [*LANGUAGE, *tower, *merger]
    assert set(kinds["qwen3_vl"]["adapted"]) == set(kinds["gemma3"]["adapted"]) == set(LANGUAGE)


def _run(case: str, directory: Path) -> dict[str, Any]:
    out = directory / "report.json"
    environ = {**os.environ, "PYTHONWARNINGS": "default"}
    environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], TORCHVISION])
    command = [sys.executable, "-m", "tests.cpu.vision_training", case, str(out)]
    done = processes.run(command, env=environ, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    report: dict[str, Any] = json.loads(out.read_text())
    return report
