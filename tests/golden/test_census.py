"""In every pinned release, the census knows each use of an engine, in targets and in all other modules."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from trlpatch.outcomes import ENGINE_USE
from trlpatch.preview import Preview
from trlpatch.rewrite.census.findings import in_modules
from trlpatch.rewrite.census.uses import unknown_uses
from trlpatch.rewrite.census.vocabulary import MENTIONED, OWN_PROCESS
from trlpatch.rewrite.tree import Tree
from trlpatch.source.locate import find_trl


def test_no_use_of_an_engine_is_unknown(
    version: str, trl_tree: Callable[[str], Path], previewed: Callable[[str], Preview]
) -> None:
    outcomes = [outcome for file in previewed(version).files for outcome in file.rewritten.outcomes]
    assert [outcome.reason for outcome in outcomes if outcome.patch == ENGINE_USE] == []
    assert [(found.target, found.drift) for found in in_modules(find_trl(trl_tree(version)))] == []


def test_unpatched_targets_with_an_engine_are_unknown(version: str, previewed: Callable[[str], Preview]) -> None:
    for file in previewed(version).files:
        engines = {"engine_reuse", "live_adapter"}
        if engines & {outcome.patch for outcome in file.rewritten.outcomes if outcome.status == "applied"}:
            assert unknown_uses(Tree(ast.parse(file.source.text))), file.name


def test_a_file_that_is_not_parsed_has_no_use(version: str, trl_tree: Callable[[str], Path]) -> None:
    for path in (trl_tree(version) / "trl").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not MENTIONED.search(text) and "llm" in text.lower():
            assert unknown_uses(Tree(ast.parse(text)), None) == [], path


def test_modules_set_apart_are_there(version: str, trl_tree: Callable[[str], Path]) -> None:
    install = find_trl(trl_tree(version))
    for entry in OWN_PROCESS:
        assert (install.root / entry.module).is_file() == (install.release in entry.trl), entry
