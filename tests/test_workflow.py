"""The workflow for GitHub Actions runs what tox has, for every release."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden.sources import ROOT, pinned, stacks
from tests.tox_environments import by_default, environments

PATH = ROOT / ".github" / "workflows" / "ci.yml"
WORKFLOW: dict[Any, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))
JOBS: dict[str, Any] = WORKFLOW["jobs"]
EVENTS: dict[str, Any] = WORKFLOW[True]  # YAML 1.1 reads the key `on` as true
RUNNING_TOX = [name for name in JOBS if name != "environments"]


@functools.cache
def listed() -> dict[str, list[str]]:
    """Return what the job `environments` gives to the others, by running its command."""
    (step,) = [step for step in JOBS["environments"]["steps"] if step.get("id") == "list"]
    path = ROOT / ".tox" / f"github-output-{os.getpid()}"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "GITHUB_OUTPUT": str(path), "PATH": tools}
    try:
        subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=ROOT, env=environ, check=True)
        lines = path.read_text(encoding="utf-8").splitlines()
    finally:
        path.unlink()
    return {name: json.loads(value) for name, _, value in (line.partition("=") for line in lines)}


def environments_of(job: dict[str, Any]) -> list[str]:
    """Return the tox environments that a job runs."""
    (command,) = [step["run"] for step in job["steps"] if step.get("run", "").startswith("tox ")]
    (name,) = re.findall(r"^tox -e (\S.*)$", command)
    if name != "${{ matrix.environment }}":
        return name.split(",")
    matrix = job["strategy"]["matrix"]["environment"]
    if isinstance(matrix, list):
        return [name for entry in matrix for name in entry.split(",")]
    (output,) = re.findall(r"^\$\{\{ fromJSON\(needs\.environments\.outputs\.(\w+)\) \}\}$", matrix)
    assert job["needs"] == "environments"
    assert JOBS["environments"]["outputs"][output] == f"${{{{ steps.list.outputs.{output} }}}}"
    return listed()[output]


def test_every_release_is_trained_with_and_has_its_golden_compared() -> None:
    assert sorted(environments_of(JOBS["train"])) == sorted(f"trl{version}-cpu" for version in pinned())
    assert sorted(environments_of(JOBS["engine"])) == sorted(f"engine-{stack}" for stack in stacks())
    assert "golden" in environments_of(JOBS["check"])


def test_the_older_releases_that_a_plain_tox_trains_with_run_on_the_newer_stack_too() -> None:
    older = [release for release in pinned().values() if (release.cpu, release.tier) == ("cpu4", "cpu")]
    assert environments_of(JOBS["train-on-transformers-5"]) == [f"trl{release.version}-cpu5" for release in older]


@pytest.mark.parametrize("name", RUNNING_TOX)
def test_jobs_run_environments_that_tox_has(name: str) -> None:
    assert set(environments_of(JOBS[name])) <= environments().keys()


def test_what_a_plain_tox_runs_is_run_here_too() -> None:
    assert set(by_default()) <= {name for job in RUNNING_TOX for name in environments_of(JOBS[job])}


def test_pushes_and_pull_requests_run_the_pinned_releases_and_the_week_the_newest() -> None:
    assert EVENTS.keys() == {"push", "pull_request", "workflow_dispatch", "schedule"}
    (schedule,) = EVENTS["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"]), "once a week"
    first = [JOBS[name] for name in JOBS if name != "newest" and "needs" not in JOBS[name]]
    assert {job["if"] for job in first} == {"github.event_name != 'schedule'"}
    assert "github.event_name == 'schedule'" in JOBS["newest"]["if"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_fails_stops_no_other_and_hangs_for_an_hour_at_most(name: str) -> None:
    assert JOBS[name]["timeout-minutes"] <= 60
    assert JOBS[name].get("strategy", {"fail-fast": False})["fail-fast"] is False


@pytest.mark.parametrize("name", JOBS)
def test_actions_are_pinned_by_commit(name: str) -> None:
    used = [step["uses"] for step in JOBS[name]["steps"] if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []
