"""What a finished run of tests/runs/case.py amounts to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tests.matrix.runs import Run
from tests.runs.trainers import ALGORITHMS

LEARNED = 0.05
"""By how much the mean reward of the last five steps must exceed that of the first five, where there is one."""


def judged(
    results: Sequence[dict[str, Any]],
    about: dict[str, Any],
    *,
    steps: int,
    tolerance: float,
    drift: float,
    learned: float = LEARNED,
) -> Run:
    """Return the run that the reports of its processes, one a rank, amount to.

    `tolerance` is the largest gap of a right rollout, `drift` what the control must exceed, both in nats; `learned` is
    by how much the reward must rise.
    """
    failed = [result["error"] for result in results if "error" in result]
    if failed:
        nothing: dict[str, Any] = {"steps": 0, "gap_max": None, "control": None, "rewards": None, "sleep": ""}
        return Run(**about, **nothing, verdict="error", error=failed[0])
    first = results[0]
    largest = max(max(result["gaps"], default=float("inf")) for result in results)
    controls = [result["control"][-1] for result in results if "control" in result]
    rewards = _first_and_last(first)
    broken = []
    if largest > tolerance:
        broken.append("rollouts are not the policy's")
    if controls and min(controls) < drift:
        broken.append("the control without requests stays close to the policy: nothing is shown")
    if any(result["engines"] != 1 for result in results):
        broken.append(f"{first['engines']} engines")
    if first["reloads"]:
        broken.append(f"{first['reloads']} reloads of the checkpoint")
    if len({result["weights"] for result in results}) != 1:
        broken.append("the ranks end with different weights")
    algorithm, _, kind = about["case"].rpartition("-")
    learns = ALGORITHMS[algorithm].maximizes and kind == "lora" and not about["stock"]
    if learns and rewards and rewards[1] - rewards[0] < learned:
        broken.append("the reward does not rise")
    wrong = "wrong" if about["stock"] else "fail"
    only_notes = about["stock"] and largest <= tolerance
    return Run(
        **about,
        verdict="pass" if not broken or only_notes else wrong,
        steps=steps,
        gap_max=float(f"{largest:.3g}"),
        control=round(min(controls), 3) if controls else None,
        rewards=rewards,
        sleep=str(max(first["sleeps"])) if first["sleeps"] else "",
        note="; ".join(broken),
    )


def _first_and_last(result: dict[str, Any]) -> tuple[float, float] | None:
    # Evaluation comes last and is rewarded, too.
    rewards = result["rewards"][: len(result["rewards"]) - result["eval_rollouts"]]
    return (round(mean(rewards[:5]), 3), round(mean(rewards[-5:]), 3)) if rewards else None


def last_error(stderr: str) -> str:
    """Return what the last traceback says was raised, else the last line that says anything."""
    said = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in stderr.splitlines()]
    said = [line for line in said if line.strip() and not line.startswith("nanobind")]
    raised = [
        at for at, line in enumerate(said) if re.match(r"[A-Za-z_][\w.]*(Error|Exception|NotFound|Mismatch)\b", line)
    ]
    # TRL's lazy modules say on the line below what could not be imported.
    message = said[raised[-1] : raised[-1] + 2] if raised else said[-1:]
    return " ".join(message or ["nothing on stderr"])[:500]
