"""Training on log-probabilities in chunks is training on those of whole logits, to the last bit, on a real vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.logps_runs import GRPO, STEPS
from tests.cpu.scenarios import report_of
from trlpatch.source.locate import find_trl

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(find_trl().release >= (1, 15), reason="TRL computes its log-probabilities in chunks by itself"),
]

RUNS = [*GRPO, "rloo"]

AS_IN_0_28 = (0, 26, 2)
"""What is rewritten is the same code there. Old log-probabilities, reused in the runs that are left, are not."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every run with whole logits, in chunks, and in chunks with old log-probabilities reused."""
    directory = tmp_path_factory.mktemp("logps")
    ways = {
        "stock": ("--logps", "stock"),
        "chunked": ("--logps", "chunked"),
        "reused": ("--logps", "chunked", "--old-logps", "reuse"),
    }
    if find_trl().release == AS_IN_0_28:
        del ways["chunked"]
    return {
        way: report_of("tests.cpu.logps_runs", [], list(options), directory / f"{way}.json")
        for way, options in ways.items()
    }


def of(reports: dict[str, dict[str, Any]], way: str, name: str) -> dict[str, Any]:
    if way not in reports:
        pytest.skip("runs with TRL 0.28.0, which computes log-probabilities with the same code")
    if name not in reports[way]:
        pytest.skip("this release has no such trainer")
    found: dict[str, Any] = reports[way][name]
    return found


@pytest.mark.parametrize("way", ["chunked", "reused"])
@pytest.mark.parametrize("name", RUNS)
def test_losses_gradients_and_weights_are_equal_to_the_bit(
    reports: dict[str, dict[str, Any]], name: str, way: str
) -> None:
    stock, chunked = of(reports, "stock", name), of(reports, way, name)
    assert len(set(stock["gradients"])) == STEPS
    assert chunked["losses"] == stock["losses"]
    assert chunked["gradients"] == stock["gradients"]
    assert chunked["weights"] == stock["weights"]


@pytest.mark.parametrize("name", RUNS)
def test_logs_are_equal(reports: dict[str, dict[str, Any]], name: str) -> None:
    assert of(reports, "chunked", name)["logs"] == of(reports, "stock", name)["logs"]


@pytest.mark.parametrize("name", RUNS)
def test_every_pass_is_chunked(reports: dict[str, dict[str, Any]], name: str) -> None:
    stock, chunked = of(reports, "stock", name), of(reports, "chunked", name)
    assert stock["status"] == ""
    assert chunked["passes"] == stock["passes"]
    assert " passes in chunks, the largest of " in chunked["status"]
    assert "whole batch" not in chunked["status"]
