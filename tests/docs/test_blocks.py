"""Code blocks of the docs: each is run, or says why not; none is in a language that would not be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trlpatch
from tests.docs.pages import LANGUAGES, blocks, pages, path_of, summary
from trlpatch import errors
from trlpatch.cli import cli
from trlpatch.options import Options

OUTPUT = {"", "text", "diff", "json", "yaml", "toml", "ini"}


@pytest.mark.parametrize("page", pages(), ids=path_of)
def test_every_language_is_known_and_python_parses(page: Path) -> None:
    for block in blocks(page):
        where = f"{path_of(page)}:{block.line}"
        assert block.language in {*LANGUAGES, *OUTPUT}, where
        if block.language == "python":
            ast.parse(block.text, where)
        if not block.language:
            first = block.text.lstrip().split(" ")[0]
            assert first not in ("pip", "trlpatch", "tox"), f"{where}: bash"


def test_what_is_said_not_to_run_says_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n<!-- not run: needs\ntwo GPUs -->\n```python\nx = 1\n```\n\n<!-- a note -->\n```bash\nls\n```\n\n"
        "<!-- not run: text between -->\n\nwords\n\n```python\ny = 2\n```\n",
        encoding="utf-8",
    )
    assert [(one.line, one.language, one.why_not) for one in blocks(page)] == [
        (6, "python", "needs\ntwo GPUs"),
        (11, "bash", ""),
        (19, "python", ""),
    ]


def test_the_summary_counts_every_block_and_names_what_does_not_run() -> None:
    head, *reasons = summary()
    every, run, kept = map(int, re.findall(r"\d+", head))
    assert every == run + kept
    assert len(reasons) == kept > 0
    assert any(line.startswith("docs/guides/") for line in reasons), "folders are pages, too"


@pytest.mark.parametrize("page", pages(), ids=path_of)
def test_what_blocks_ask_of_trlpatch_is_there(page: Path) -> None:
    """Of the blocks that are not run as well."""
    for block in blocks(page):
        where = f"{path_of(page)}:{block.line}"
        if block.language == "python":
            tree = ast.parse(block.text, where)
            assert _imported(tree) <= {*trlpatch.__all__}, where
            for call in _calls(tree, "PatchFastRL"):
                words = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
                Options(*map(ast.literal_eval, call.args), **words)
        if block.language == "bash":
            assert set(re.findall(r"^trlpatch (\w+)", block.text, re.MULTILINE)) <= cli.commands.keys(), where
    raised = re.findall(r"trlpatch\.errors\.([A-Z]\w+)", page.read_text(encoding="utf-8"))
    assert set(raised) <= vars(errors).keys()


def _imported(tree: ast.AST) -> set[str]:
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "trlpatch"]
    return {alias.name for node in froms for alias in node.names}


def _calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called == name:
                yield node
