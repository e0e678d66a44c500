"""The pinned TRL sources as fixtures; a release whose sources cannot be had fails its tests."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from tests.golden import goldens, survey
from tests.golden.sources import fetch, pinned, unpacked, wheel_cache
from tests.golden.store import UPDATE, exclusive
from trlpatch.preview import Preview, preview

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.golden.store import Golden
    from tests.golden.survey import Counts

# Read before any test gets a home directory of its own.
CACHE = wheel_cache()
RELEASES = pinned()


def selected(config: pytest.Config) -> list[str]:
    """Return the releases of `--trl`, or all."""
    asked = [name.removeprefix("trl").removesuffix("-golden") for name in config.getoption("--trl")]
    if unknown := sorted(set(asked) - RELEASES.keys()):
        raise pytest.UsageError(f"--trl {', '.join(unknown)}: not in golden/releases.toml")
    return asked or list(RELEASES)


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist registers it too; without it the mark says nothing.
    config.addinivalue_line("markers", "xdist_group(name): with --dist loadgroup, on one worker with its like")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "version" in metafunc.fixturenames:
        # A release is previewed once for all of its tests, where one worker has them all.
        releases = [
            pytest.param(version, marks=pytest.mark.xdist_group(version)) for version in selected(metafunc.config)
        ]
        metafunc.parametrize("version", releases, scope="session")


@pytest.fixture(scope="session")
def updating(request: pytest.FixtureRequest) -> frozenset[str]:
    """The releases whose goldens are written anew."""
    return frozenset(selected(request.config)) if request.config.getoption("--golden-update") else frozenset()


@pytest.fixture(scope="session")
def trl_tree(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from version to unpacked wheel; where that cannot be had it fails, it never skips."""
    with exclusive():  # The second worker finds in the cache what the first one downloaded.
        failures = fetch([RELEASES[version] for version in selected(request.config)], CACHE)

    def tree(version: str) -> Path:
        if version in failures:
            pytest.fail(str(failures[version]), pytrace=False)
        return unpacked(RELEASES[version], CACHE)

    return tree


@pytest.fixture(scope="session")
def previewed(trl_tree: Callable[[str], Path]) -> Callable[[str], Preview]:
    """Return a function from version to its preview, computed once."""

    # One release at a time: pytest orders session parameters so that all tests of a release follow each other.
    @functools.lru_cache(maxsize=1)
    def of(version: str) -> Preview:
        return preview(trl_tree(version))

    return of


@pytest.fixture(scope="session")
def rendered(previewed: Callable[[str], Preview]) -> Callable[[str], dict[str, Golden]]:
    """Return a function from version to the goldens by target; a patch that does not fit fails."""

    @functools.lru_cache(maxsize=1)
    def of(version: str) -> dict[str, Golden]:
        preview = previewed(version)
        if preview.failures:
            pytest.fail(f"patches do not fit TRL {version}:\n{preview.drift()}", pytrace=False)
        return goldens.render(preview)

    return of


@pytest.fixture
def expected_anchors(version: str, trl_tree: Callable[[str], Path], updating: frozenset[str]) -> Counts:
    """What tests/golden/anchors.json expects of the release; updating surveys a release that is not in it yet."""
    with exclusive():
        expected = survey.recorded()
        if version not in expected and version in updating:
            expected[version] = survey.survey(trl_tree(version) / "trl")
            survey.record(expected, RELEASES)
    if version not in expected:
        pytest.fail(f"missing: tests/golden/anchors.json has no TRL {version}. Survey it: {UPDATE}", pytrace=False)
    return expected[version]
