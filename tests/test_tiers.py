"""Tests run in the tier that their markers name."""

from __future__ import annotations

import pytest

from tests.golden.sources import ROOT
from tests.tiers import TIERS, tier_of, tiers_of


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
