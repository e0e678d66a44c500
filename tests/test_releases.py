"""`python -m tests.releases add` writes the places that follow from a release."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests import releases
from tests.golden.sources import RELEASES_TOML, pinned

NEWEST = list(pinned())[-1]
NEXT = "99.2.0"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / f"trl-{NEXT}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr(f"trl-{NEXT}.dist-info/METADATA", "Name: trl\nRequires-Python: >=3.12\n\nBody\n")
    return path


def test_the_entry_is_the_newest_and_trains_in_its_place(wheel: Path) -> None:
    text = RELEASES_TOML.read_text(encoding="utf-8")
    before, after = tomllib.loads(text), tomllib.loads(releases.with_entry(text, NEXT, wheel))
    *others, last = before["release"]
    assert after["stacks"] == before["stacks"]
    assert after["release"] == [
        *others,
        {**last, "tier": "golden"},
        {
            "version": NEXT,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "requires_python": ">=3.12",
            "cpu": last["cpu"],
            "tier": "cpu",
        },
    ]


def test_a_release_that_is_not_the_newest_is_refused(wheel: Path) -> None:
    with pytest.raises(releases.CannotAdd, match=f"not newer than {NEWEST}"):
        releases.with_entry(RELEASES_TOML.read_text(encoding="utf-8"), "0.18.3", wheel)


def test_the_package_and_the_demo_follow() -> None:
    module = releases.with_newest_tested(releases.RELEASES_PY.read_text(encoding="utf-8"), NEXT)
    assert "\nNEWEST_TESTED: Release = (99, 2, 0)\n" in module
    pyproject = tomllib.loads(releases.with_demo_bound(releases.PYPROJECT.read_text(encoding="utf-8"), NEXT))
    assert "trl>=1.14.2,<99.3" in pyproject["project"]["optional-dependencies"]["demo"]


def test_what_is_there_already_stays_as_it_is() -> None:
    for change, file in {
        releases.with_newest_tested: releases.RELEASES_PY,
        releases.with_demo_bound: releases.PYPROJECT,
    }.items():
        text = file.read_text(encoding="utf-8")
        assert change(text, NEWEST) == text


def test_a_line_that_is_gone_is_named() -> None:
    with pytest.raises(releases.CannotAdd, match=r"NEWEST_TESTED.*found 0"):
        releases.with_newest_tested("", NEXT)


def test_the_tests_that_write_goldens_exist() -> None:
    assert {"tests/golden/test_anchors.py", "tests/golden/test_golden.py"} <= set(releases.TESTS)
    assert all((releases.ROOT / path).is_file() for path in releases.TESTS)
