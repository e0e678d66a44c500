"""Hooks before a commit, changelog fragments, releases and findings have the form that is written down for them."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.golden.sources import ROOT

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOWNCRIER: dict[str, Any] = PYPROJECT["tool"]["towncrier"]
HOOKS: list[dict[str, Any]] = [
    hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repo["hooks"]
]
RELEASE: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
FRAGMENTS = sorted(path for path in (ROOT / TOWNCRIER["directory"]).iterdir() if path.name != "README.md")
FINDINGS = sorted((ROOT / "findings").glob("*.sh"))


@pytest.mark.parametrize("tool", ["ruff", "import-linter"])
def test_hooks_run_the_versions_that_tox_runs(tool: str) -> None:
    # tests/test_meta.py compares these pins with tox's.
    (pin,) = [line for line in PYPROJECT["project"]["optional-dependencies"]["dev"] if line.startswith(f"{tool}==")]
    hooked = {line for hook in HOOKS for line in hook["additional_dependencies"] if line.startswith(tool)}
    assert hooked == {pin}


def test_hooks_pin_what_they_install() -> None:
    for hook in HOOKS:
        assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", line) for line in hook["additional_dependencies"]), hook["id"]


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.name)
def test_fragments_have_a_name_that_towncrier_reads_and_a_sentence(path: Any) -> None:
    types = "|".join(kind["directory"] for kind in TOWNCRIER["type"])
    assert re.fullmatch(rf"(\d+|\+[a-z0-9-]+)\.({types})\.md", path.name)
    assert path.read_text(encoding="utf-8").rstrip().endswith((".", ")"))


def test_the_changelog_has_one_place_for_releases() -> None:
    assert (ROOT / TOWNCRIER["filename"]).read_text(encoding="utf-8").count(TOWNCRIER["start_string"]) == 1


def test_the_version_is_the_tag() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["hatch"]["version"]["source"] == "vcs"
    assert RELEASE[True]["push"]["tags"] == ["v[0-9]*"]  # YAML 1.1 reads the key `on` as true
    described = PYPROJECT["tool"]["hatch"]["version"]["raw-options"]["scm"]["git"]["describe_command"]
    assert described[described.index("--match") + 1] == "v[0-9]*"


def test_the_job_that_publishes_holds_no_secret_and_runs_none_of_our_code() -> None:
    publish = RELEASE["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("run" in step for step in publish["steps"])
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert RELEASE["permissions"] == {"contents": "read"}


def test_actions_of_the_release_are_pinned_by_their_commit() -> None:
    used = [step["uses"] for job in RELEASE["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action) for action in used)


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_findings_have_their_form_and_a_row_in_the_list(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    head, _, body = text.partition("set -euo pipefail\n")
    for word in ("# One would guess:", "# What happens:", "# Source: ", "# Versions: ", "# Seen:\n#   "):
        assert word in head, word
    assert re.search(r"# Versions: .*\b20\d\d-\d\d-\d\d\.", head)
    assert "trap 'rm -rf \"$work\"' EXIT" in body
    assert "assert " in body
    assert "trlpatch" not in body
    assert f"[{path.stem}]({path.name})" in (ROOT / "findings/README.md").read_text(encoding="utf-8")
