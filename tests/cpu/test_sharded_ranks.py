"""GRPO on two ranks over gloo: sharded by FSDP2, loaded by FastLanguageModel, one engine over both."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes, warm
from tests.cpu.ranks import SECONDS
from tests.cpu.scenarios import TOLERANCE
from tests.cpu.sharded_ranks import STEPS
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(
        find_trl().release != NEWEST_TESTED and "TRLPATCH_TEST_RANKS" not in os.environ,
        reason="half a minute each: run with the newest release, and with any on request (TRLPATCH_TEST_RANKS=1)",
    ),
]


def ranks_of(case: str, directory: Path) -> list[dict[str, Any]]:
    """What each rank has found. torchrun binds a port of the system's choice and keeps it (`--standalone`)."""
    checkpoint = tiny.checkpoint(directory / "model")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.warm", "run"]
    cache = str(directory / "cache")
    done = processes.run(
        [sys.executable, "-m", *launcher, "tests.cpu.sharded_ranks", case, str(checkpoint), str(directory)],
        env={**os.environ, **warm.variables(), "XDG_CACHE_HOME": cache, "PYTHONWARNINGS": "default"},
        timeout=SECONDS + 60,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    ranks: list[dict[str, Any]] = [json.loads((directory / f"rank{i}.json").read_text()) for i in range(2)]
    for rank in ranks:
        assert rank["ranks"] == 2
        assert [rollout["step"] for rollout in rank["rollouts"]] == list(range(STEPS))
        assert len({rollout["adapter"] for rollout in rank["rollouts"]} - {None}) == STEPS
        assert max(rollout["gap"] for rollout in rank["rollouts"]) < TOLERANCE
        assert min(rank["control"]) > 100 * TOLERANCE, "without the adapter the engine is another policy"
    assert ranks[0]["weights"] == ranks[1]["weights"], "every rank takes the same step"
    return ranks


def prompts(rank: dict[str, Any]) -> set[tuple[int, ...]]:
    return {tuple(prompt) for rollout in rank["rollouts"] for prompt in rollout["prompts"]}


def test_an_adapter_sharded_by_fsdp2_is_handed_over_alone(tmp_path: Path) -> None:
    first, second = ranks_of("fsdp2", tmp_path)
    assert first["sharded"] == second["sharded"] == "FSDP2"
    assert "adapter in place" in first["engines"][0]
    assert not prompts(first) & prompts(second)


def test_from_pretrained_gives_each_rank_an_engine_of_its_own(tmp_path: Path) -> None:
    first, second = ranks_of("loaded", tmp_path)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert "weights shared" in first["engines"][0]
    assert not prompts(first) & prompts(second)


@pytest.mark.skipif("TRLPATCH_TEST_RANKS" not in os.environ, reason="on request: ranks that spin for each other")
def test_one_engine_over_both_ranks_is_asked_alike_by_each(tmp_path: Path) -> None:
    first, second = ranks_of("tensor_parallel", tmp_path)
    assert "tensor parallelism" in first["engines"][0]
    for mine, theirs in zip(first["rollouts"], second["rollouts"], strict=True):
        assert mine["adapter"] == theirs["adapter"], "one name on both, although one had counted further"
        assert mine["texts"] == theirs["texts"]
