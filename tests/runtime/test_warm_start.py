"""A start with a filled cache and index: what is not read, and what is noticed all the same."""

from __future__ import annotations

import importlib
import inspect
import os
import py_compile
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import SKIP
from tests.runtime.conftest import FakeTrl
from trlpatch import errors
from trlpatch.runtime import prepare, session
from trlpatch.runtime.cache import INDEX
from trlpatch.runtime.report import PatchReport
from trlpatch.source import locate

BEFORE = 'return "step"'
SAME_SIZE = 'return "stop"'


@pytest.fixture
def indexed(patch_grpo: Callable[..., PatchReport], an_hour_later: None) -> PatchReport:
    """The report of a start that left its answer in the index."""
    patch_grpo()
    session.revert()
    report = patch_grpo()
    session.revert()
    return report


@pytest.fixture
def reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TRL's sources nor trlpatch's rules can be read."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"read: {arguments}")

    monkeypatch.setattr(locate, "_read", refuse)
    monkeypatch.setattr(prepare, "rules_digest", refuse)


def trainer_of(fake_trl: FakeTrl) -> Path:
    return fake_trl.root / "trainer/grpo_trainer.py"


def rewrite_in_place(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_reads_neither_trl_nor_rules(indexed, patch_grpo, reads_nothing):
    report = patch_grpo()
    assert set(report.cache.values()) == {"hit"}
    assert (report.entries, report.files, report.modules) == (indexed.entries, indexed.files, indexed.modules)


def test_reads_a_text_when_its_module_is_imported(fake_trl, indexed, patch_grpo, reads_nothing, monkeypatch):
    read = []
    monkeypatch.setattr(prepare.Cache, "text", lambda self, key, name, sha: read.append(name) or "answer = 42\n")
    patch_grpo()
    assert read == []
    assert importlib.import_module("trl.trainer.grpo_config").answer == 42
    assert read == ["grpo_config.py"]


def test_runs_what_a_start_without_index_runs(fake_trl, indexed, patch_grpo, reads_nothing):
    patch_grpo()
    import trl

    assert trl.GRPOTrainer("model").step() == "step"
    assert "_trlpatch.configure" in inspect.getsource(trl.GRPOTrainer)


def test_unpatch_returns_to_trls_text(fake_trl, indexed, patch_grpo):
    patch_grpo()
    import trl

    session.revert()
    assert trl.GRPOTrainer("model").step() == "step"
    assert "_trlpatch" not in inspect.getsource(trl.GRPOTrainer)


def _same_size(path: Path) -> None:
    rewrite_in_place(path, BEFORE, SAME_SIZE)


def _same_size_and_mtime(path: Path) -> None:
    before = path.stat()
    _same_size(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _moved_over(path: Path) -> None:
    copy = path.with_suffix(".new")
    shutil.copy2(path, copy)
    _same_size_and_mtime(copy)
    copy.replace(path)


@pytest.mark.parametrize("edit", [_same_size, _same_size_and_mtime, _moved_over])
def test_an_edit_of_trl_is_noticed(fake_trl, indexed, patch_grpo, edit):
    time.sleep(0.02)  # the tick of the file system's clock: in use, `settled` sees to this
    edit(trainer_of(fake_trl))
    assert patch_grpo().cache == {"grpo": "miss", "grpo_config": "hit"}
    import trl

    assert trl.GRPOTrainer("model").step() == "stop"


def test_edits_within_one_second_are_noticed(fake_trl, patch_grpo):
    # As fast as this machine can: without the rule about fresh files, stats of equal ticks would be trusted.
    words = ["stop", "stem", "stet", "step"]
    for before, word in zip(["step", *words], words, strict=False):
        rewrite_in_place(trainer_of(fake_trl), f'return "{before}"', f'return "{word}"')
        patch_grpo()
        session.revert()
        assert set(patch_grpo().cache.values()) == {"hit"}
        import trl

        assert trl.GRPOTrainer("model").step() == word
        session.revert()
        for name in [name for name in sys.modules if name.startswith("trl.")]:
            del sys.modules[name]
    assert not (fake_trl.cache / INDEX).exists()


def test_a_changed_rule_is_noticed(indexed, patch_grpo, monkeypatch, tmp_path):
    rule = tmp_path / "rule.py"
    monkeypatch.setattr(prepare, "rule_places", lambda: [str(rule)])
    patch_grpo()
    session.revert()
    read = []
    monkeypatch.setattr(prepare, "rules_digest", lambda: read.append("rules") or "digest")
    patch_grpo()
    assert read == []
    session.revert()
    rule.touch()
    patch_grpo()
    assert read == ["rules"]


def test_another_version_of_trl_or_of_a_rule_is_another_question(fake_trl, indexed, patch_grpo, monkeypatch):
    read = []
    digest = prepare.rules_digest
    monkeypatch.setattr(prepare, "rules_digest", lambda: read.append("rules") or digest())
    fake_trl.version("0.25.1")
    patch_grpo()
    session.revert()
    monkeypatch.setattr(prepare, "rules_versions", lambda: ("trlpatch-9.dist-info", "libcst-9.dist-info"))
    patch_grpo()
    assert read == ["rules", "rules"]


def test_a_text_that_changed_before_the_start_is_a_miss(indexed, patch_grpo):
    file = Path(indexed.files["grpo"])
    good = file.read_text(encoding="utf-8")
    file.write_text("raise SystemExit('this must not run')\n", encoding="utf-8")
    assert patch_grpo().cache == {"grpo": "miss", "grpo_config": "hit"}
    assert file.read_text(encoding="utf-8") == good


def _damage(file: Path) -> None:
    """Replace a text by one of the same size and mtime."""
    before = file.stat()
    file.write_text("raise SystemExit('this must not run')\n".ljust(before.st_size), encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("happens", [_damage, Path.unlink, lambda file: file.parent.chmod(0o777)])
def test_a_text_that_changes_between_start_and_import_is_made_anew(fake_trl, indexed, patch_grpo, happens):
    patch_grpo()
    happens(Path(indexed.files["grpo"]))
    import trl

    assert trl.GRPOTrainer("model").step() == "step"
    assert "_trlpatch.configure" in inspect.getsource(trl.GRPOTrainer)


def test_a_text_made_anew_where_nothing_can_be_written_runs_from_memory(fake_trl, indexed, patch_grpo, monkeypatch):
    patch_grpo()
    _damage(Path(indexed.files["grpo"]))

    def refuse(*arguments: object) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(prepare.Cache, "write", refuse)
    import trl

    assert trl.GRPOTrainer("model").step() == "step"
    assert "_trlpatch.configure" in inspect.getsource(trl.GRPOTrainer)
    assert inspect.getfile(trl.GRPOTrainer) == indexed.files["grpo"]


@pytest.mark.parametrize("when", ["before the start", "before the import"])
def test_byte_code_of_a_damaged_text_does_not_run(fake_trl, indexed, patch_grpo, monkeypatch, when):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    if when == "before the import":
        patch_grpo()
    file = Path(indexed.files["grpo"])
    _damage(file)
    py_compile.compile(str(file), doraise=True)
    if when == "before the start":
        assert patch_grpo().cache["grpo"] == "miss"
    import trl

    assert trl.GRPOTrainer("model").step() == "step"


def test_text_that_is_gone_and_a_trl_that_changed_is_said(fake_trl, indexed, patch_grpo):
    patch_grpo()
    Path(indexed.files["grpo"]).unlink()
    rewrite_in_place(trainer_of(fake_trl), BEFORE, SAME_SIZE)
    with pytest.raises(errors.PatchError, match=r"grpo_trainer\.py changed after PatchFastRL.*new process"):
        importlib.import_module("trl.trainer.grpo_trainer")


def test_unpatch_refuses_where_trl_changed_since(fake_trl, indexed, patch_grpo):
    patch_grpo()
    import trl

    trainer = trl.GRPOTrainer
    rewrite_in_place(trainer_of(fake_trl), BEFORE, SAME_SIZE)
    with pytest.raises(errors.PatchError, match=r"grpo_trainer\.py changed after PatchFastRL"):
        session.revert()
    assert session.status()
    assert "_trlpatch.configure" in inspect.getsource(trainer)


@pytest.mark.usefixtures("unmeasured")
def test_warm_start_generates_no_dataclass(fake_trl):
    fake_trl.settle()
    code = f"""
        import sys, trlpatch
        report = trlpatch.PatchFastRL("grpo", skip={SKIP!r})
        print(*report.cache.values(), "dataclasses" in sys.modules, "libcst" in sys.modules)
    """
    fake_trl.python(code)
    assert fake_trl.python(code).stdout.split() == ["hit", "hit", "False", "False"]
