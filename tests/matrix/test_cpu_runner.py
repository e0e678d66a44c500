"""What `python -m tests.cpu.matrix` runs, and what it makes of a process that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu import matrix
from tests.cpu.matrix import newest_of_minors, ordered, result_of
from tests.golden.sources import pinned
from tests.matrix.runs import OTHER


def test_by_default_every_minor_runs_with_its_newest_patch_release() -> None:
    minors = newest_of_minors()
    assert {version.rpartition(".")[0] for version in minors} == {version.rpartition(".")[0] for version in pinned()}
    assert len(minors) == len({version.rpartition(".")[0] for version in minors})
    assert {"0.18.2", "0.29.1", "1.14.2", list(pinned())[-1]} <= set(minors)


def test_cases_run_where_the_release_has_a_trainer_for_them() -> None:
    cases = ["grpo-lora", "rloo-lora", "gold-lora", "distillation-lora"]
    found = [(release.version, case) for release, case in ordered(["0.21.0", "0.25.1", "1.16.0"], cases)]
    assert found == [
        ("0.21.0", "grpo-lora"),
        *[("0.25.1", case) for case in cases[:3]],
        *[("1.16.0", case) for case in cases],
    ]


def test_an_interpreter_of_ones_own_stands_for_a_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(matrix, "unpacked", lambda release, cache: Path(f"trl-{release.version}"))
    monkeypatch.setattr(matrix, "environment_of", lambda tree: {"TREE": str(tree)})
    monkeypatch.setattr(matrix, "measure", lambda *arguments: asked.append(arguments))
    release, python = pinned()["0.22.2"], Path("other/bin/python")
    matrix.measure_pinned(release, python, "grpo-lora", 10, tmp_path, seconds=3000)
    command = "python -m tests.cpu.matrix --out RUNS.json --steps 10 --python PYTHON --cases grpo-lora -- 0.22.2"
    environ = {"TREE": "trl-0.22.2"}
    assert asked == [(python.absolute(), environ, "0.22.2", "grpo-lora", 10, OTHER, tmp_path, command, 3000)]


def test_a_process_that_fails_leaves_the_line_that_says_why() -> None:
    code = "import sys; sys.stderr.write('warning: x\\n'); raise ImportError('no such name')"
    assert result_of([sys.executable, "-c", code], dict(os.environ)) == {"error": "ImportError: no such name"}


def test_the_last_result_of_a_process_counts() -> None:
    code = "print('RESULT {\"gaps\": [1]}'); print('RESULT {\"gaps\": [2]}'); print('nanobind: leaked')"
    assert result_of([sys.executable, "-c", code], dict(os.environ)) == {"gaps": [2]}


def test_a_process_that_outlasts_its_limit_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert result_of(["python"], {}, 1800) == {"error": "not finished after 1800 s"}
