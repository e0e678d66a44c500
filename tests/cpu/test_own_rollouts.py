"""What a trainer's own code asks of the engine without an adapter, with a real vLLM; and a training interrupted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, report_of

pytestmark = [pytest.mark.cpu, pytest.mark.release]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps for each way of calling the engine, and one training that is interrupted."""
    directory = tmp_path_factory.mktemp("own_rollouts")
    return report_of("tests.cpu.own_rollouts", [], [], directory / "report.json")


@pytest.mark.parametrize("way", ["generate", "chat", "by_hand", "in_a_thread"])
def test_a_request_without_an_adapter_is_one_to_the_policy(way: str, report: dict[str, Any]) -> None:
    calls = report[way]["calls"]
    assert len(calls) == 3
    assert all(len(call["adapters"]) == 1 for call in calls)
    assert len({call["adapters"][0] for call in calls} - {"None"}) == 3
    assert max(call["gap"] for call in calls) < TOLERANCE


def test_whoever_asks_like_that_is_told_once_and_where(report: dict[str, Any]) -> None:
    (said,) = [line for line in report["generate"]["said"] if "without a lora_request" in line]
    assert "rollout_functions.py:" in said
    assert "GRPOTrainer" in said


def test_without_the_adapter_means_without_it(report: dict[str, Any]) -> None:
    assert [call["adapters"] for call in report["base"]["calls"]] == [["None"]] * 3
    assert min(call["gap"] for call in report["base"]["calls"]) > 50 * TOLERANCE


def test_an_interrupted_training_leaves_no_request_to_the_next_caller(report: dict[str, Any]) -> None:
    after = report["interrupted"]
    assert after["prompts"] == ["the dog ran"]
    assert after["gap"] < TOLERANCE
    assert after["steps"] == 3
    assert any("8 unfinished requests of a call that ended in KeyboardInterrupt" in line for line in after["said"])
