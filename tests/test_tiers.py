"""Tests run in the tier that their markers name."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cpu.stack import WORKERS
from tests.golden.sources import ROOT
from tests.tiers import LONGEST, SPLIT, TIERS, WITH_ENGINE, group_of, longest_first, tier_of, tiers_of


@pytest.mark.parametrize(
    ("markers", "tier"),
    [
        (set(), "unit"),
        ({"parametrize", "skipif"}, "unit"),
        ({"torch"}, "torch"),
        ({"cpu"}, "engine"),
        ({"torch", "cpu"}, "engine"),
        ({"cpu", "release"}, "release"),
        ({"gpu"}, "gpu"),
    ],
)
def test_the_last_marker_decides(markers: set[str], tier: str) -> None:
    assert tier_of(markers) == tier


@pytest.mark.parametrize(
    ("source", "tiers"),
    [
        ("def test_a(): ...", {"unit"}),
        ("@pytest.mark.parametrize('a', [1])\ndef test_a(a): ...", {"unit"}),
        ("pytestmark = pytest.mark.torch", {"torch"}),
        ("pytestmark = [pytest.mark.cpu, pytest.mark.skipif(True)]", {"engine"}),
        ("pytestmark = [pytest.mark.cpu, pytest.mark.release]", {"release"}),
        ("pytestmark = pytest.mark.torch\n@pytest.mark.cpu\ndef test_a(): ...", {"torch", "engine"}),
        ("@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.cpu)])\ndef a(): ...", {"unit", "engine"}),
    ],
)
def test_a_file_may_have_tests_of_its_tier_and_of_later_ones(source: str, tiers: set[str]) -> None:
    assert tiers_of(source) == tiers


def test_what_depends_on_the_release_needs_an_engine() -> None:
    """`-m cpu` has both."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if "release" in tiers_of(source):
            assert "pytest.mark.cpu" in source, path


def test_files_that_are_started_first_are_there() -> None:
    assert len(set(LONGEST)) == len(LONGEST)
    for path in LONGEST:
        assert tiers_of((ROOT / path).read_text(encoding="utf-8")) & set(WITH_ENGINE), path


def test_files_that_take_long_are_started_first() -> None:
    files = ["tests/cpu/test_a.py", SPLIT[0], "tests/cpu/test_b.py", LONGEST[0]]
    items: Any = [SimpleNamespace(nodeid=f"{file}::test_{number}") for file in files for number in range(2)]
    ordered = [item.nodeid for item in longest_first(items)]
    assert ordered == [f"{files[file]}::test_{number}" for file in (3, 1, 0, 2) for number in range(2)]


@pytest.mark.parametrize(
    ("test", "group"),
    [
        ("tests/cpu/test_grpo.py::test_a[x]", "tests/cpu/test_grpo.py"),
        ("tests/docs/test_pages.py::test_a[docs/a.md]", "tests/docs/test_pages.py docs/a.md]"),
        ("tests/cpu/test_notebooks.py::test_a[rloo]", "tests/cpu/test_notebooks.py rloo]"),
        ("tests/cpu/test_notebooks.py::test_b[rloo]", "tests/cpu/test_notebooks.py rloo]"),
        ("tests/cpu/test_ranks.py::test_b", "tests/cpu/test_ranks.py "),
    ],
)
def test_a_group_is_a_file_or_a_parameter(test: str, group: str) -> None:
    assert group_of(test) == group


GROUPED = """
import pytest
pytestmark = pytest.mark.cpu
@pytest.mark.parametrize("a", ["x", "y"])
def test_it(a): ...
@pytest.mark.parametrize("a", ["x", "y"])
def test_that(a): ...
"""


def test_groups_stay_in_one_process(pytester: pytest.Pytester) -> None:
    for file in ("tests/cpu/test_a.py", LONGEST[0], SPLIT[0]):
        path = pytester.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GROUPED, encoding="utf-8")
    pytester.makeini("[pytest]\nmarkers =\n    cpu\n")
    words = ["-p", "tests.tiers", "--tier", "engine", *WORKERS, "tests", "-v", "-p", "no:randomly"]
    done = pytester.runpytest_subprocess(*words)
    done.assert_outcomes(passed=12)
    ran: dict[str, set[str]] = {}
    for line in done.outlines:
        if found := re.match(r"\[(gw\d)\] .* PASSED (\S+)", line):
            ran.setdefault(group_of(found[2]), set()).add(found[1])
    assert [len(workers) for workers in ran.values()] == [1, 1, 1, 1], ran


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A suite with a file per tier."""
    for tier, marker in TIERS.items():
        mark = f"pytestmark = pytest.mark.{marker}" if marker else ""
        pytester.makepyfile(**{f"test_{tier}": f"import pytest\n{mark}\ndef test_it(): ...\n"})
    pytester.makepyfile(test_lacking="import pytest\npytest.importorskip('no_such_package')\ndef test_it(): ...\n")
    pytester.makeini("[pytest]\nmarkers =\n    torch\n    cpu\n    release\n    gpu\n")
    return pytester


@pytest.mark.parametrize("tier", ["engine", "release", "gpu"])
def test_other_tiers_are_not_even_imported(suite: pytest.Pytester, tier: str) -> None:
    done = suite.runpytest_inprocess("-p", "tests.tiers", "--tier", tier, "-v")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines([f"test_{tier}.py::test_it PASSED*"])


def test_an_absent_package_fails_the_tier(suite: pytest.Pytester) -> None:
    done = suite.runpytest_inprocess("-p", "tests.tiers", "--tier", "unit")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*could not import 'no_such_package'*The tier unit must have it*"])
    suite.runpytest_inprocess("-p", "tests.tiers").assert_outcomes(passed=5, skipped=1)


def test_the_torch_tier_has_no_vllm(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import importlib.util, sys, types\nsys.modules['vllm'] = types.ModuleType('vllm')\n")
    pytester.makepyfile(
        "import importlib.util, pytest\npytestmark = pytest.mark.torch\n"
        "def test_it(): assert importlib.util.find_spec('vllm') is None\n"
    )
    done = pytester.runpytest_subprocess("-p", "tests.tiers", "--tier", "torch", "-W", "default")
    done.assert_outcomes(passed=1)
