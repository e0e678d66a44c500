"""The pinned TRL sources as fixtures; a release whose sources cannot be had fails its tests."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from tests.golden.sources import fetch, pinned, unpacked, wheel_cache
from trlpatch.preview import Preview, preview

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Read before any test gets a home directory of its own.
CACHE = wheel_cache()
RELEASES = pinned()


def selected(config: pytest.Config) -> list[str]:
    """Return the releases of `--trl`, or all."""
    asked = [name.removeprefix("trl").removesuffix("-golden") for name in config.getoption("--trl")]
    if unknown := sorted(set(asked) - RELEASES.keys()):
        raise pytest.UsageError(f"--trl {', '.join(unknown)}: not in golden/releases.toml")
    return asked or list(RELEASES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", selected(metafunc.config), scope="session")


@pytest.fixture(scope="session")
def trl_tree(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from version to unpacked wheel; where that cannot be had it fails, it never skips."""
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
