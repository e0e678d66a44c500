"""Liger's GRPO loss beside a real vLLM: the part of it that runs without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpu.scenarios import TOLERANCE, report_of
from trlpatch.source.locate import find_trl

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(
        find_trl().release >= (1, 13), reason="TRL 1.13 dropped Liger's GRPO loss; its layers need a GPU"
    ),
]


def test_rollouts_have_the_adapter_that_ligers_loss_trains(tmp_path: Path) -> None:
    report = report_of("tests.cpu.liger", [], [], tmp_path / "report.json")
    assert len(report["losses"]) == 3
    assert len({rollout["adapter"] for rollout in report["rollouts"]} - {None}) == 3
    assert len(report["rollouts"]) == 3
    assert max(rollout["gap"] for rollout in report["rollouts"]) < TOLERANCE
    assert any(report["losses"]), "a loss of zero would train nothing"
