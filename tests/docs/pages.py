"""The code blocks of README.md and docs/: which run, and which are said not to and why.

A block in `python` or `bash` is run as it stands, all of a page in order, in one directory. One that cannot be has a
comment before it that Markdown does not show: `<!-- not run: REASON -->`. Other languages are output and files.

    python -m tests.docs.pages    # how many run, and the reason of each that does not
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "bash")
_ENGINE = re.compile(r"\bLLM\(|from_pretrained\(|Trainer\(")
_TRL = re.compile(r"^(from|import) trl\b", re.MULTILINE)
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->\s*$", re.DOTALL)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        line: of its first line of code, from 1.
        language: what stands behind the fence; empty for output.
        why_not: why it is not run; empty where it is.
    """

    line: int
    language: str
    text: str
    why_not: str = ""


def pages() -> list[Path]:
    """Return the pages, README.md first; those of folders in docs/ as well."""
    return [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def path_of(page: Path) -> str:
    """Return a page's path as messages and test ids have it: from the root, with slashes."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found, before = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            reason = _NOT_RUN.search(before)
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(token.map[0] + 2, language, token.content, reason[1] if reason else ""))
        if token.type in ("html_block", "fence", "inline"):
            before = token.content if token.type == "html_block" else ""
    return found


def runnable(page: Path) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [block for block in blocks(page) if block.language in LANGUAGES and not block.why_not]


def python_of(page: Path) -> str:
    """Return the Python that is run of a page, in one piece."""
    return "".join(block.text for block in runnable(page) if block.language == "python")


def has_engine(page: Path) -> bool:
    """Whether what is run of a page builds an engine, a model or a trainer."""
    return bool(_ENGINE.search(python_of(page)))


def imports_torch(page: Path) -> bool:
    """Whether the process that runs a page imports torch, transformers and what comes with them."""
    return has_engine(page) or bool(_TRL.search(python_of(page)))


def summary() -> list[str]:
    """Return how many blocks there are and how many run, then a line for each that does not, with its reason."""
    code = [(page, block) for page in pages() for block in blocks(page) if block.language in LANGUAGES]
    kept = [(page, block) for page, block in code if block.why_not]
    head = f"{len(code)} code blocks, {len(code) - len(kept)} run in CI, {len(kept)} not run with reasons"
    return [head, *(f"{path_of(page)}:{block.line}: {' '.join(block.why_not.split())}" for page, block in kept)]


if __name__ == "__main__":
    print("\n".join(summary()))
