"""What `python -m tests.cpu.newest` runs, in which order, and what is left when it is interrupted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cpu import newest
from tests.matrix.runs import Run, load, run_of


def run(case: str, verdict: str) -> Run:
    passed = verdict == "pass"
    entry: dict[str, Any] = {
        "trl": "1.16.0",
        "case": case,
        "device": "cpu",
        "stack": "newest",
        "versions": {"vllm": "0.32.0", "transformers": "5.19.0"},
        "date": "2026-11-28",
        "command": "python -m tests.cpu.newest --out RUNS.json",
        "stock": False,
        "verdict": verdict,
        "steps": 10,
        "gap_max": 8e-07 if passed else None,
        "control": 0.28 if passed else None,
        "rewards": [0.5, 0.6] if passed else None,
        "sleep": "",
        "seconds": 31.2,
        "error": "" if passed else "RuntimeError: no",
    }
    return run_of(entry)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts in their order; nothing is installed, started or measured."""
    ran: list[str] = []

    def started(command: list[str], **_: Any) -> SimpleNamespace:
        ran.append(command[2])
        return SimpleNamespace(returncode=0)

    def measured(*arguments: Any) -> Run:
        ran.append(arguments[3])
        return run(arguments[3], "pass")

    monkeypatch.setattr(newest, "newest_of_all", lambda: ran.append("install"))
    monkeypatch.setattr(newest, "versions", dict)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.16.0")
    monkeypatch.setattr(newest, "measure", measured)
    monkeypatch.setattr(subprocess, "run", started)
    return ran


def test_what_is_read_comes_before_what_trains(parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert newest.main([]) == 0
    assert parts == ["install", "trlpatch", "tests.seams", *newest.CASES, "pytest"]
    said = capsys.readouterr().out
    assert [f"$ {name}" in said and f"s] {name}" in said for name in ("installation", "trlpatch check")] == [True] * 2


def test_what_is_installed_can_be_taken_as_it_is(parts: list[str]) -> None:
    newest.main(["--installed"])
    assert parts[0] == "trlpatch"


def test_all_parts_run_and_the_first_failure_is_the_status(
    parts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def started(command: list[str], **_: Any) -> SimpleNamespace:
        parts.append(command[2])
        return SimpleNamespace(returncode={"tests.seams": 3, "pytest": 5}.get(command[2], 0))

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(newest, "measure", lambda *arguments: run(arguments[3], "error"))
    assert newest.main(["--out", str(tmp_path / "RUNS.json")]) == 3
    assert parts[-1] == "pytest"
    assert [run.verdict for run in load(tmp_path / "RUNS.json")] == ["error"] * len(newest.CASES)


def test_runs_before_an_interrupt_are_written(
    parts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(*arguments: Any) -> Run:
        if arguments[3] == newest.CASES[-1]:
            raise KeyboardInterrupt
        return run(arguments[3], "pass")

    monkeypatch.setattr(newest, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        newest.main(["--out", str(tmp_path / "RUNS.json")])
    assert len(load(tmp_path / "RUNS.json")) == len(newest.CASES) - 1
