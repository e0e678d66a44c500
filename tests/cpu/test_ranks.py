"""DistributedDataParallel on two ranks over gloo, each rank with a real vLLM of its own."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests import ports, processes, warm
from tests.cpu.ranks import SECONDS
from tests.cpu.scenarios import TOLERANCE
from trlpatch.source.locate import find_trl
from trlpatch.source.releases import NEWEST_TESTED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(
        find_trl().release not in ((0, 18, 0), (0, 28, 0), NEWEST_TESTED),
        reason="takes minutes: run with the oldest and the newest release of each stack only",
    ),
]


def launch(case: str, directory: Path) -> subprocess.CompletedProcess[str]:
    checkpoint = tiny.checkpoint(directory / "model")
    master = ports.environment()["MASTER_PORT"]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", master, "-m", "tests.warm", "run"]
    cache = str(directory / "cache")
    return processes.run(
        [sys.executable, "-m", *launcher, "tests.cpu.ranks", case, str(checkpoint), str(directory)],
        env={**os.environ, **warm.variables(), "XDG_CACHE_HOME": cache, "PYTHONWARNINGS": "default"},
        timeout=SECONDS + 60,
    )


@pytest.mark.parametrize("case", ["attached", "launcher", "own"])
def test_ranks_roll_out_with_the_adapter_and_stay_in_step(case: str, tmp_path: Path) -> None:
    if case == "launcher" and find_trl().release == (0, 18, 0):
        pytest.skip("who launches an attached engine is the stack's: with the newest release of each")
    done = launch(case, tmp_path)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]
    for rank in ranks:
        assert (rank["ranks"], rank["engines_built"]) == (2, 1)
        assert [rollout["step"] for rollout in rank["rollouts"]] == [0, 1, 2]
        assert len({rollout["adapter"] for rollout in rank["rollouts"]} - {None}) == 3
        # TRL's own engine is bfloat16.
        assert max(rollout["gap"] for rollout in rank["rollouts"]) < (0.1 if case == "own" else TOLERANCE)
    first, second = ranks
    assert first["weights"] == second["weights"], "gradients are averaged: every rank takes the same step"
    for mine, theirs in zip(first["rollouts"], second["rollouts"], strict=True):
        assert not set(map(tuple, mine["prompts"])) & set(map(tuple, theirs["prompts"]))


def test_an_engine_built_before_the_ranks_met_is_refused(tmp_path: Path) -> None:
    if Version(version("vllm")) < Version("0.28"):
        pytest.skip("vLLM 0.23 does not get as far: under torchrun it waits for a store that nobody serves")
    done = launch("late", tmp_path)
    assert done.returncode != 0
    assert "EngineMismatch" in done.stderr
    assert "accelerate.PartialState()" in done.stderr
    assert not list(tmp_path.glob("rank*.json"))
