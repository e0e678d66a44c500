"""Start a training in a process of its own and read its report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests import processes

SECONDS = 900
"""The limit of a run; a cluster with all its cases takes a third of it on two cores that others use, too."""

# float32 on both sides; thirty steps with several seeds stayed below 3e-4, while the control reaches 1.
TOLERANCE = 1e-3


def train(case: str, directory: Path, *, algorithm: str = "grpo", steps: int = 30) -> dict[str, Any]:
    """Run one case (see tests/cpu/training.py) with a home of its own; fails with its output when it does."""
    options = ["--algorithm", algorithm, "--steps", str(steps)]
    return report_of("tests.cpu.training", [case], options, directory / f"{case}.json")


def report_of(module: str, arguments: list[str], options: list[str], out: Path) -> dict[str, Any]:
    """Run `python -m module *arguments out *options` in a process of its own and read the report that it writes.

    Raises:
        AssertionError: it failed, or did not end in time; with the ends of what it said.
    """
    environ = {**os.environ, "XDG_CACHE_HOME": str(out.parent / "cache"), "PYTHONWARNINGS": "default"}
    words = [*arguments, str(out), *options]
    done = processes.run_module(module, words, env=environ, timeout=SECONDS)
    assert done.returncode == 0, f"{module} {' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
