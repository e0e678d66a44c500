"""A TRL release that nobody knows: `trlpatch check`, PatchFastRL and status() say the same of it, and it is so."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.golden.forward import BASE, CASES, NEXT, Case, Trl
from trlpatch import errors
from trlpatch.cli import cli
from trlpatch.outcomes import Outcome
from trlpatch.runtime import fit, session
from trlpatch.source.releases import parse_release
from trlpatch.source.targets import TARGETS


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all cases: what none of them changes is rewritten once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def next_trl(
    trl_tree: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Trl]:
    """The sources of the newest release as a later one, first on sys.path; patches are taken back afterwards."""
    sources = trl_tree(BASE)
    shutil.copytree(sources / "trl", tmp_path / "trl", ignore=shutil.ignore_patterns("__pycache__", "*.jinja"))
    (tmp_path / f"trl-{NEXT}.dist-info").mkdir()
    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(cache))
    monkeypatch.setattr(fit, "NEWEST_TESTED", parse_release(BASE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Trl(tmp_path / "trl")
    if session._active is not None:
        session._active.finder.restore({})
    session._active = session._disabled = None
    assert "trl" not in sys.modules


def check(trl: Trl) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli, ["check", "--json", "--trl-path", str(trl.root)])
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


def stock_of(case: Case) -> set[str]:
    names = case.failed.keys() if case.stock is None else case.stock
    return {*names, *(f"{name}_config" for name in names if f"{name}_config" in TARGETS)} - case.gone


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, next_trl: Trl) -> None:
    case = CASES[name]
    case.change(next_trl)

    status, found = check(next_trl)
    failures = [Outcome(**{"anchors": {}, **_known(failure)}) for failure in found["failures"]]
    wrong = {**case.failed, **case.modules}
    assert {failure.target for failure in failures} == wrong.keys(), found["verdict"]
    assert (status, found["fits"]) == ((1, False) if wrong else (0, True))
    gone = {target for target in found["absent"] if target not in case.failed}
    assert gone == case.gone
    assert bool(found["untaught"]) is bool(case.untaught)
    if case.untaught:
        assert f"; {case.untaught}{found['untaught'][0]['target']}" in found["verdict"]
    held_back = set(found["held_back"])
    assert held_back == stock_of(case) - case.failed.keys()

    if wrong:
        with pytest.raises(errors.PatchError) as raised:
            session.PatchFastRL()
        for target, text in wrong.items():
            assert f" on {target} of TRL {NEXT}" in str(raised.value)
            assert text in str(raised.value)
        assert not session.status()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = session.PatchFastRL(on_drift="stock")
    said = {warning.category: str(warning.message) for warning in caught}
    unknown = said.pop(errors.UnknownEngineUse, "")
    assert all(target in unknown and text in unknown for target, text in case.modules.items())
    assert bool(unknown) is bool(case.modules)
    assert said.keys() == {errors.UntestedRelease, *([errors.LeftStock] if case.failed else [])}
    assert all(found["verdict"] in text for text in said.values())
    assert all(text in said[errors.LeftStock] for text in case.failed.values())
    assert {target for target, state in report.cache.items() if state == "off"} | case.failed.keys() == stock_of(case)
    assert {entry.target for entry in report.entries if entry.status == "failed"} == case.failed.keys()
    assert report.absent == {target: found["absent"][target] for target in case.gone}
    assert found["verdict"] in str(session.status().full())
    assert ("every patch fits" in found["verdict"]) is not bool(case.failed)

    for algorithm, text in case.refused.items():
        with pytest.raises(errors.UnknownAlgorithm) as refused:
            session.PatchFastRL(algorithm)
        about, _, here = str(refused.value).partition("This release has: ")
        assert text in about
        assert algorithm not in here.rstrip(".").split(", ")


def _known(failure: dict[str, Any]) -> dict[str, Any]:
    return {name: failure[name] for name in ("target", "patch", "status", "reason") if name in failure}
