"""GRPO with tools: several rollouts per step, each with the adapter of that step, on a real vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, report_of
from trlpatch.source.locate import find_trl

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(find_trl().release < (0, 26), reason="TRL has tools from 0.26 on"),
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5,
        reason="TRL refuses tools below transformers 5, and vLLM 0.23 needs transformers 4",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps in which every turn of the model is a call of the one tool."""
    directory: Path = tmp_path_factory.mktemp("tools")
    return report_of("tests.cpu.tool_calls", [], [], directory / "report.json")


def test_the_model_calls_the_tool_and_reads_its_answer(report: dict[str, Any]) -> None:
    first = [turn for turn in report["turns"] if not turn["answered"]]
    later = [turn for turn in report["turns"] if turn["answered"]]
    assert {turn["step"] for turn in first} == {turn["step"] for turn in later} == {0, 1, 2}
    assert all(text.startswith("<tool_call>") for turn in first for text in turn["texts"])
    assert all(turn["answered"] == len(turn["texts"]) for turn in later)
    assert len(report["called"]) >= sum(len(turn["texts"]) for turn in first)
    assert all(0 <= number <= 9 for call in report["called"] for number in call)


def test_each_turn_has_the_adapter_of_its_step(report: dict[str, Any]) -> None:
    of_step = [{turn["adapter"] for turn in report["turns"] if turn["step"] == step} for step in range(3)]
    assert [len(names) for names in of_step] == [1, 1, 1]
    assert len(set.union(*of_step) - {None}) == 3
    assert max(turn["gap"] for turn in report["turns"]) < TOLERANCE


def test_without_the_request_the_score_is_another(report: dict[str, Any]) -> None:
    assert min(turn["control"] for turn in report["turns"] if turn["step"] > 0) > 50 * TOLERANCE
    assert max(turn["control"] for turn in report["turns"] if turn["step"] == 0) < TOLERANCE
    assert report["engines_built"] == 0
