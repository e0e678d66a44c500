"""A part of a benchmark in a process of its own: what it reported, and its error if it failed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench_step import status_of
from benchmarks.step_timers import Lines
from benchmarks.step_ways import ENVIRONMENT, ENVIRONMENT_CPU
from tests import ports
from tests.runs.judge import last_error

ROOT = Path(__file__).resolve().parents[1]


def run_child(
    script: Path, words: list[str], folder: Path, timeout: float, *, cuda: bool, logs: Path | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run `script --child EVENTS *words` for at most `timeout` seconds; return its events, and its error or None.

    The first of the words names its files: events go into `folder`, what it printed into `logs`, if given.
    """
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    events, log = folder / f"{words[0]}-events", ((logs or folder) / f"{words[0]}.log").resolve()
    environ = {
        **({} if cuda else ENVIRONMENT_CPU),
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)])),
        **ports.environment(),
    }
    command = [sys.executable, str(script.resolve()), "--child", str(events), *words]
    status = status_of(command, environ, folder, log, timeout)
    if status == 0:
        return Lines.read(events), None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = last_error("\n".join(line for line in lines if not line.startswith((" - leaked", "nanobind"))))
    return Lines.read(events), said if status is not None else f"no end after {timeout:.0f} s; last: {said}"
