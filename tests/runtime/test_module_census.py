"""Modules of TRL that trlpatch does not know and that use an engine: said under "raise", survived under "stock"."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.helpers import SKIP
from trlpatch.errors import AnchorDrift, UnknownEngineUse
from trlpatch.rewrite.census import findings
from trlpatch.runtime import index as indexing
from trlpatch.runtime import session
from trlpatch.runtime.module_census import module_census
from trlpatch.source.locate import find_trl

NEW = "experimental/newpo/newpo_trainer.py"
USE = "def roll(trainer):\n    return trainer.llm.generate('a')\n"


@pytest.fixture
def newpo(fake_trl):
    """The tiny TRL with a module more, which rolls out on a trainer's engine."""
    fake_trl.write(NEW, USE)
    return fake_trl


def test_raise_names_the_module_the_line_and_what_to_do(newpo):
    with pytest.raises(AnchorDrift) as caught:
        session.PatchFastRL(skip=SKIP)
    text = str(caught.value)
    assert text.startswith("an engine is used as no patch knows in TRL 0.25.0 (modules trl/experimental/newpo/newpo")
    assert f"file     {newpo.root / NEW}:2, in roll\n" in text
    assert "line     return trainer.llm.generate('a')\n" in text
    assert "it names no `lora_request`\n" in text
    assert 'on_drift="stock" patches all targets and warns of these modules' in text
    assert not session.status()


def test_stock_patches_every_target_and_warns(newpo):
    with pytest.warns(UnknownEngineUse, match="newpo_trainer") as caught:
        report = session.PatchFastRL(skip=SKIP, on_drift="stock")
    assert len([one for one in caught if one.category is UnknownEngineUse]) == 1
    assert {outcome.target for outcome in report.applied} == {"grpo", "grpo_config"}
    assert report.notes == ("an engine is used as no patch knows in trl/experimental/newpo/newpo_trainer.py",)


def test_who_names_a_trainer_is_warned(newpo):
    with pytest.warns(UnknownEngineUse):
        assert session.PatchFastRL("grpo", skip=SKIP).applied


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test wrote just now count as settled."""
    now = indexing.time.time_ns
    monkeypatch.setattr(indexing.time, "time_ns", lambda: now() + 3600 * 10**9)


def test_files_are_read_again_only_after_a_change(newpo, settled, monkeypatch: pytest.MonkeyPatch):
    install = find_trl(newpo.root)
    before = module_census(install)
    assert [found.target for found in before] == [f"trl/{NEW}"]
    read: list[str] = []
    real = findings.in_module
    monkeypatch.setattr(findings, "in_module", lambda text, name, *more: read.append(name) or real(text, name, *more))
    assert module_census(install) == before
    assert read == []
    newpo.write(NEW, "pass\n")
    assert module_census(install) == ()
    assert f"trl/{NEW}" in read
    read.clear()
    assert module_census(install) == ()
    assert read == []


def test_an_answer_of_another_shape_is_none(newpo, settled, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(indexing.Index, "recall", lambda *_: [{"target": "a"}])
    assert [found.target for found in module_census(find_trl(newpo.root))] == [f"trl/{NEW}"]


def test_a_tree_that_cannot_be_listed_is_read_without_the_index(newpo, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> indexing.Stamp:
        raise PermissionError("no")

    monkeypatch.setattr("trlpatch.runtime.module_census.stamp", refuse)
    assert [found.target for found in module_census(find_trl(newpo.root))] == [f"trl/{NEW}"]


def test_a_known_trl_is_not_warned_of(fake_trl, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownEngineUse)
        assert session.PatchFastRL(skip=SKIP).notes == ()
