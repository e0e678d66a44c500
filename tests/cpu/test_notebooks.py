"""The notebooks of examples/notebooks train on a real vLLM: each as people run it, on a tiny model, in few steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, report_of
from tests.notebooks import scripts
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.cpu, pytest.mark.release]

EVERY = [(0, 22, 2), NEWEST_TESTED]
"""The releases with which all run: the one that most public notebooks pin, and the newest."""
WITH_ANY_RELEASE = "grpo_rewards"

NEEDS = {"rloo": (0, 22), "grpo_tools": (0, 26), "grpo_multi_turn": (0, 28)}
NEEDS_CUDA = {"grpo_4bit": "FastLanguageModel loads in 4 bits on CUDA only: tests/gpu/test_notebooks.py"}
WITHOUT_ENGINE = {"full_finetuning"}
"""vLLM's CPU backend repacks its weights and takes none in: transformers generates."""

NAMES = [script.stem for script in scripts()]


@pytest.fixture(params=NAMES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    release = find_trl().release
    if chosen in NEEDS_CUDA:
        pytest.skip(NEEDS_CUDA[chosen])
    if release < NEEDS.get(chosen, (0,)):
        pytest.skip(f"TRL has what it shows from {NEEDS[chosen]} on")
    if chosen == "grpo_tools" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("TRL refuses tools below transformers 5, and vLLM 0.23 needs transformers 4")
    if release not in EVERY and chosen != WITH_ANY_RELEASE:
        pytest.skip("runs with TRL 0.22.2 and the newest release")
    return chosen


@pytest.fixture(scope="module")
def report(name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report_of("tests.cpu.notebook_runs", [name], [], tmp_path_factory.mktemp(name) / "report.json")


def of_training(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [rollout for rollout in report["rollouts"] if rollout["step"] is not None]


def test_it_trains_to_the_end_and_rewards_are_computed(name: str, report: dict[str, Any]) -> None:
    assert report["patched"]
    assert report["steps"] == len(report["rewards"]) == (4 if name == "grpo_resume" else 3)
    assert all(map(math.isfinite, report["rewards"]))
    assert len(set(report["rewards"])) > 1
    assert all(len(values) == len(report["rewards"]) for values in report["by_function"].values())
    assert report["moved"] > 1e-3


def test_every_rollout_has_the_adapter_as_it_is_then(name: str, report: dict[str, Any]) -> None:
    rollouts = of_training(report)
    if name in WITHOUT_ENGINE:
        assert report["engines_built"] == len(rollouts) == 0
        return
    assert report["engines_built"] == 1
    assert {rollout["step"] for rollout in rollouts} == set(range(report["steps"]))
    for rollout in rollouts:
        (adapter,) = rollout["adapters"]
        assert adapter != "None"
    assert len({adapter for rollout in rollouts for adapter in rollout["adapters"]}) > 1
    assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE


def test_what_it_saves_is_there(name: str, report: dict[str, Any]) -> None:
    files = set(report["files"])
    if name in WITHOUT_ENGINE:
        assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= files
    else:
        assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} <= files
    if name == "grpo_rewards":
        assert {"merged/config.json", "merged/model.safetensors", "merged/tokenizer.json"} <= files
    if name == "grpo_resume":
        assert "checkpoint-2/adapter_model.safetensors" in files


def test_what_it_is_about_happens(name: str, report: dict[str, Any]) -> None:
    if name == "grpo_reasoning":
        *_, base, live, saved = report["rollouts"]
        assert base["adapters"] == ["None"]
        assert len({*base["adapters"], *live["adapters"], *saved["adapters"]}) == 3
        assert report["sft_steps"] > 0
        assert report["answers"].keys() == {"base model", "live adapter", "saved adapter"}
        assert report["answers"]["live adapter"] == report["answers"]["saved adapter"]
        assert live["logprob"] == pytest.approx(saved["logprob"], abs=TOLERANCE)
        assert abs(live["logprob"] - base["logprob"]) > 20 * TOLERANCE
    elif name == "grpo_resume":
        assert report["rewards"][:2] == report["first_run"]
    elif name == "grpo_tools":
        assert len(report["calls"]) >= report["steps"] * 4
        assert len(of_training(report)) > report["steps"], "several turns in each step"
    elif name == "grpo_multi_turn":
        assert len(of_training(report)) > report["steps"], "several turns in each step"
