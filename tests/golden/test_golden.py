"""The patched text of every pinned TRL release is the one that was reviewed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.golden import goldens, store
from tests.golden.sources import pinned

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.golden.store import Golden


def fail_on(wrong: list[str]) -> None:
    if wrong:
        pytest.fail("\n".join([*wrong, f"If this is what you intend: {store.UPDATE}"]), pytrace=False)


def update(version: str, now: dict[str, Golden], updating: frozenset[str]) -> None:
    refused = ""
    try:
        store.update(version, now, updating, pinned().keys())
    except store.CannotUpdate as error:
        refused = str(error)
    if refused:  # Failed here, so that the report has the message once.
        pytest.fail(refused, pytrace=False)


def test_goldens(version: str, rendered: Callable[[str], dict[str, Golden]], updating: frozenset[str]) -> None:
    now = rendered(version)
    with store.exclusive():
        if updating:
            update(version, now, updating)
        fail_on(list(goldens.findings(version, now)))


def test_every_golden_belongs_to_a_pinned_release(updating: frozenset[str]) -> None:
    with store.exclusive():
        if updating:
            store.tidy(pinned().keys())
            if updating == pinned().keys():
                return  # What is still wrong may be written anew by a test that comes later.
        fail_on(list(goldens.tree_findings(pinned().keys())))


def test_diffs_hold_no_dates_no_machine_paths_and_no_line_numbers(
    version: str, rendered: Callable[[str], dict[str, Golden]]
) -> None:
    for golden in rendered(version).values():
        lines = golden.diff.splitlines()
        file = golden.entry["file"]
        assert lines[:2] == ([f"--- a/{file}", f"+++ b/{file}"] if lines else [])
        hunks = [line for line in lines if line.startswith("@@")]
        assert bool(hunks) == bool(lines)
        assert [line for line in hunks if not re.fullmatch(r"@@ (<module>|[A-Za-z_][\w.]*) @@", line)] == []
