"""The site's first page is README.md; links to files outside docs/ lead to the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_linked(text, config.repo_url)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point links that lead out of docs/, such as ../SECURITY.md, at the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def pointed(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if path.startswith("docs/"):
            return link[0]
        return f"]({config.repo_url}/blob/main/{path})"

    return re.sub(r"\]\((\.\./[^)]+)\)", pointed, markdown)


def _linked(readme: str, repository: str) -> str:
    inside = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", readme)
    return re.sub(
        r"\]\((?!https?:|#|[\w-]+\.(?:md|svg))([^)]+)\)|\]\(([A-Z]+\.md)\)", rf"]({repository}/blob/main/\1\2)", inside
    )
