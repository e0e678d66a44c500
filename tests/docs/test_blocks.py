"""Code blocks of the docs: each is run, or says why not; none is in a language that would not be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.docs.pages import LANGUAGES, ROOT, blocks, pages

OUTPUT = {"", "text", "diff", "json", "yaml", "toml", "ini"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_language_is_known_and_python_parses(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
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
