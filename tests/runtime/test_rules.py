from __future__ import annotations

import sys
from pathlib import Path

from trlpatch.runtime import rules
from trlpatch.runtime.rules import rules_digest


def test_rules_change_with_the_sources_of_the_rewriter(tmp_path, monkeypatch):
    for room in ("rewrite/patches", "source"):
        (tmp_path / room).mkdir(parents=True)
    files = ("outcomes.py", "trl_names.py", "rewrite/a.py", "rewrite/patches/b.py", "source/c.py")
    for file in files:
        (tmp_path / file).write_text("", encoding="utf-8")
    monkeypatch.setattr(rules, "_PACKAGE", tmp_path)
    seen = {rules_digest()}
    for file in files:
        (tmp_path / file).write_text("changed", encoding="utf-8")
        seen.add(rules_digest())
    (tmp_path / "source/c.py").rename(tmp_path / "source/d.py")
    seen.add(rules_digest())
    monkeypatch.setattr(rules, "_versions", lambda *names: ("2.0", "2.0"))
    seen.add(rules_digest())
    assert len(seen) == 8


def test_rules_cover_all_that_the_rewriter_imports(fake_trl):
    code = """
        import sys
        from trlpatch.rewrite.registry import patches
        from trlpatch.rewrite.rewriter import rewrite
        patches()
        print(*(m.__file__ for n, m in sys.modules.items() if n.startswith("trlpatch.")), sep="\\n")
    """
    imported = set(fake_trl.python(code).stdout.split())
    known = {str(rules._PACKAGE / name) for name in rules._rules()}
    assert {Path(file).name for file in imported - known} == {"errors.py"}


def test_rules_know_a_development_version_by_its_metadata(tmp_path, monkeypatch):
    # An editable install has another version after each commit: another key, never an error.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    seen = {rules_digest()}
    for version in ("0.1.1.dev3+g1234567", "0.1.1.dev4+g89abcde.d20261127"):
        metadata = tmp_path / f"trlpatch-{version}.dist-info"
        metadata.mkdir()
        assert rules._versions("trlpatch") == (metadata.name,)
        seen.add(rules_digest())
        metadata.rmdir()
    assert len(seen) == 3
