"""The workflow for GitHub Actions runs what tox.ini has, for every release."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.golden.sources import ROOT, pinned
from tests.tox_ini import default_environments, environments

PATH = ROOT / ".ci" / "github-actions.yml"
TEXT = PATH.read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, Any] = WORKFLOW["jobs"]
EVENTS: dict[str, Any] = WORKFLOW[True]  # YAML 1.1 reads the key `on` as true


def environments_of(job: dict[str, Any]) -> list[str]:
    """Return the tox environments that a job runs, one per entry of its matrix."""
    (command,) = [step["run"] for step in job["steps"] if step.get("run", "").startswith("tox ")]
    (name,) = re.findall(r"^tox -e (\S.*)$", command)
    found = re.fullmatch(r"(.*)\$\{\{ matrix\.(\w+) \}\}(.*)", name)
    if found is None:
        return [name]
    return [f"{found[1]}{value}{found[3]}" for value in job["strategy"]["matrix"][found[2]]]


def test_its_head_says_where_to_copy_it() -> None:
    assert f"cp {PATH.relative_to(ROOT).as_posix()} .github/workflows/" in TEXT.partition("name:")[0]


def test_every_release_is_trained_with_and_has_its_golden_compared() -> None:
    assert JOBS["train"]["strategy"]["matrix"]["release"] == list(pinned())
    assert environments_of(JOBS["train"]) == [f"trl{version}-cpu" for version in pinned()]
    assert "golden" in environments_of(JOBS["check"])


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_environments_that_tox_has(name: str) -> None:
    assert set(environments_of(JOBS[name])) <= environments().keys()


def test_what_a_plain_tox_runs_is_run_here_too() -> None:
    assert default_environments() <= {name for job in JOBS.values() for name in environments_of(job)}


def test_pushes_and_pull_requests_run_the_pinned_releases_and_the_week_the_newest() -> None:
    assert EVENTS.keys() == {"push", "pull_request", "workflow_dispatch", "schedule"}
    (schedule,) = EVENTS["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"]), "once a week"
    pinned_jobs = [JOBS[name] for name in JOBS if name != "newest"]
    assert {job["if"] for job in pinned_jobs} == {"github.event_name != 'schedule'"}
    assert "github.event_name == 'schedule'" in JOBS["newest"]["if"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_fails_stops_no_other_and_hangs_for_an_hour_at_most(name: str) -> None:
    assert JOBS[name]["timeout-minutes"] <= 60
    assert JOBS[name].get("strategy", {"fail-fast": False})["fail-fast"] is False
