"""RLOO on a real vLLM CPU engine, with the TRL release that can be imported."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, mean, train
from trlpatch.source.locate import find_trl

pytestmark = [pytest.mark.cpu, pytest.mark.release]


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if find_trl().release < (0, 22):
        pytest.skip("RLOO rolls out on vLLM from TRL 0.22 on")
    return train("attached", tmp_path_factory.mktemp("attached"), algorithm="rloo")


def test_each_step_rolls_out_with_the_adapter_of_that_step(attached: dict[str, Any]) -> None:
    assert attached["engines_built"] == 0
    assert attached["uses_attached"]
    assert len({rollout["adapter"] for rollout in attached["rollouts"]} - {None}) == 30
    assert max(rollout["gap"] for rollout in attached["rollouts"]) < TOLERANCE


def test_without_the_request_the_gap_opens(attached: dict[str, Any]) -> None:
    first, *moved = attached["control"]
    assert first["gap"] < TOLERANCE
    assert min(rollout["gap"] for rollout in moved) > 100 * TOLERANCE


def test_the_policy_learns(attached: dict[str, Any]) -> None:
    rewards = attached["rewards"]
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.3
