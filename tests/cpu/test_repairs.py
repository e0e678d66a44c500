"""Repaired TRL does what TRL did with the vLLM it was written for, with the TRL release that can be imported."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.cpu.scenarios import train
from tests.cpu.training import PATTERN, PROMPT_LIMIT
from trlpatch.source.locate import find_trl

pytestmark = [pytest.mark.cpu, pytest.mark.release]

ENGINE_TRUNCATES = (0, 24)
"""From which release on the engine gets truncated prompts, from TRL or with compat="on", or is asked to truncate."""


@pytest.fixture(scope="module", params=["grpo", "rloo"])
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps with a regular expression for completions and a limit on prompts."""
    if request.param == "rloo" and find_trl().release < (0, 22):
        pytest.skip("RLOO rolls out on vLLM from TRL 0.22 on")
    report = train("limited", tmp_path_factory.mktemp("limited"), algorithm=request.param, steps=2)
    return {**report, "engine_truncates": find_trl().release >= ENGINE_TRUNCATES}


def test_completions_follow_the_regular_expression(limited: dict[str, Any]) -> None:
    texts = [text for rollout in limited["rollouts"] for text in rollout["texts"]]
    assert len(set(texts)) > 8
    assert [text for text in texts if not re.fullmatch(PATTERN, text)] == []


def test_prompts_keep_their_last_tokens(limited: dict[str, Any]) -> None:
    assert all(len(ids) > PROMPT_LIMIT for ids in limited["full_prompts"])
    expected = [ids[-PROMPT_LIMIT:] for ids in limited["full_prompts"]]
    if not limited["engine_truncates"]:
        expected += limited["full_prompts"]  # the trainer truncates
    for rollout in limited["rollouts"]:
        assert [prompt for prompt in rollout["prompts"] if prompt not in expected] == []


def test_each_step_has_its_adapter_all_the_same(limited: dict[str, Any]) -> None:
    assert [rollout["step"] for rollout in limited["rollouts"]] == [0, 1]
    assert len({rollout["adapter"] for rollout in limited["rollouts"]} - {None}) == 2
