"""The patched text of every pinned TRL release is the one that was reviewed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.golden import goldens
from tests.golden.sources import pinned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trlpatch.preview import Preview


def test_goldens(version: str, previewed: Callable[[str], Preview], request: pytest.FixtureRequest) -> None:
    preview = previewed(version)
    assert not preview.failures, f"patches do not fit TRL {version}:\n{preview.drift()}"
    rendered = goldens.render(preview)
    if request.config.getoption("--golden-update"):
        goldens.write(version, rendered)
    wrong = list(goldens.findings(version, rendered))
    if wrong:
        pytest.fail("\n".join([*wrong, f"If this is what you intend: {goldens.UPDATE}"]), pytrace=False)


def test_every_golden_has_a_pinned_release() -> None:
    folders = {path.name for path in goldens.GOLDEN.iterdir() if path.is_dir()}
    assert folders == pinned().keys()


@pytest.fixture
def one_golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A golden directory with one release in it, and what the rewriter gives for that release."""
    rendered = {
        "manifest.json": '{"files": {"trl/a.py": {"upstream_sha256": "1111"}}}',
        "a.diff": "--- a/trl/a.py\n+++ b/trl/a.py\n",
    }
    monkeypatch.setattr(goldens, "GOLDEN", tmp_path)
    goldens.write("1.0.0", rendered)
    return rendered


def test_equal_goldens_have_no_findings(one_golden: dict[str, str]) -> None:
    assert list(goldens.findings("1.0.0", one_golden)) == []


def test_missing_golden_is_found(one_golden: dict[str, str]) -> None:
    assert list(goldens.findings("1.0.0", {**one_golden, "b.diff": "x"})) == ["missing: golden/1.0.0/b.diff"]


def test_release_without_goldens_is_found(one_golden: dict[str, str]) -> None:
    found = list(goldens.findings("2.0.0", one_golden))
    assert found == ["missing: golden/2.0.0/a.diff", "missing: golden/2.0.0/manifest.json"]


def test_orphan_golden_is_found(one_golden: dict[str, str]) -> None:
    del one_golden["a.diff"]
    (finding,) = goldens.findings("1.0.0", one_golden)
    assert finding == "orphan: golden/1.0.0/a.diff belongs to no patched file"


def test_stale_golden_is_shown_as_a_diff(one_golden: dict[str, str]) -> None:
    (finding,) = goldens.findings("1.0.0", {**one_golden, "a.diff": "--- a/trl/a.py\n+++ b/trl/b.py\n"})
    assert finding.startswith("stale: golden/1.0.0/a.diff")
    assert "-+++ b/trl/a.py" in finding
    assert "++++ b/trl/b.py" in finding


def test_another_upstream_source_is_named_first(one_golden: dict[str, str]) -> None:
    manifest = one_golden["manifest.json"].replace("1111", "2222")
    first, *consequences = goldens.findings("1.0.0", {**one_golden, "manifest.json": manifest, "a.diff": "changed"})
    assert first.startswith("upstream source is not the pinned one: trl/a.py")
    assert len(consequences) == 2


def test_writing_removes_orphans(one_golden: dict[str, str]) -> None:
    del one_golden["a.diff"]
    goldens.write("1.0.0", one_golden)
    assert [path.name for path in (goldens.GOLDEN / "1.0.0").iterdir()] == ["manifest.json"]


def test_diffs_hold_no_dates_and_no_machine_paths(version: str, previewed: Callable[[str], Preview]) -> None:
    for file in previewed(version).files:
        header = file.diff().splitlines()[:2]
        assert header == [f"--- a/{file.name}", f"+++ b/{file.name}"]
