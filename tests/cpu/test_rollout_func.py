"""Rollouts that a user's `rollout_func` makes on the trainer's engine, with a real vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, report_of
from trlpatch.source.locate import find_trl

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(
        find_trl().release < (0, 26), reason="TRL calls rollout_func in process from 0.26 on: no rollout to look at"
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps for each way of calling the engine."""
    directory = tmp_path_factory.mktemp("rollout_functions")
    return report_of("tests.cpu.rollout_functions", [], [], directory / "report.json")


@pytest.mark.parametrize("way", ["generate", "chat", "by_hand", "explicit", "openenv", "unpatched"])
def test_each_rollout_has_the_adapter_of_its_step(way: str, report: dict[str, Any]) -> None:
    if way == "openenv" and find_trl().release >= (1, 9):
        pytest.skip("TRL 1.9 dropped the helper")
    rollouts = report[way]["rollouts"]
    assert [rollout["step"] for rollout in rollouts] == [0, 1, 2]
    assert all(len(rollout["adapters"]) == 1 for rollout in rollouts)
    assert len({rollout["adapters"][0] for rollout in rollouts} - {"None"}) == 3
    assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE
    assert len(report[way]["witness"]) == 3, "what TRL compares: the log-probabilities that rollout_func returned"
    assert max(report[way]["witness"]) < TOLERANCE


def test_the_base_model_has_to_be_asked_for(report: dict[str, Any]) -> None:
    _, *moved = report["base"]["rollouts"]
    assert [rollout["adapters"] for rollout in report["base"]["rollouts"]] == [["None"]] * 3
    assert min(rollout["gap"] for rollout in moved) > 50 * TOLERANCE


def test_without_the_patch_and_the_guard_the_same_call_comes_from_the_base_model(report: dict[str, Any]) -> None:
    _, *moved = report["unguarded"]["rollouts"]
    assert [rollout["adapters"] for rollout in report["unguarded"]["rollouts"]] == [["None"]] * 3
    assert min(rollout["gap"] for rollout in moved) > 50 * TOLERANCE
    assert max(report["unguarded"]["witness"][1:]) > 50 * TOLERANCE


def test_the_function_makes_all_rollouts_on_the_attached_engine(report: dict[str, Any]) -> None:
    assert report.pop("engines_built") == 0
    assert {way["seen"] for way in report.values()} == {24}
