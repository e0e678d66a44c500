"""What golden/ should hold of a release, computed from the rewriter, and what is wrong with what it holds."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.golden.store import GOLDEN, LOCK, PLAN, RELEASE, Entry, Golden, Tree, layout, read

if TYPE_CHECKING:
    from trlpatch.preview import FilePreview, Preview

CONTEXT_LINES = 2
SHOWN_LINES = 60
MODULE = "<module>"

_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")
_Scope = tuple[int, int, str]


def render(preview: Preview) -> dict[str, Golden]:
    """Return the goldens of one release by target."""
    return {
        file.source.target.name: Golden(
            _entry(file),
            without_line_numbers(file.diff(CONTEXT_LINES), file.source.text, file.rewritten.text),
        )
        for file in preview.files
    }


def _entry(file: FilePreview) -> Entry:
    outcomes = file.rewritten.outcomes
    return {
        "file": file.name,
        "upstream_sha256": file.source.sha256,
        "patched_sha256": file.rewritten.sha256,
        "plan": [f"{step.patch.name}@{step.variant.trl}" for step in file.plan.steps],
        "anchors": {o.patch: dict(sorted(o.anchors.items())) for o in outcomes if o.status == "applied"},
        "touched": list(file.rewritten.touched),
        "skipped": {skip.patch.name: skip.reason for skip in file.plan.skips},
    }


def without_line_numbers(diff: str, upstream: str, patched: str) -> str:
    """Put the class and function of a hunk's first change in the place of its line numbers.

    Numbers differ between releases and with every edit above. That a hunk is where it belongs is in `patched_sha256`.
    """
    lines = diff.splitlines(keepends=True)
    scopes = {"-": _scopes(upstream), "+": _scopes(patched)}
    for at, line in enumerate(lines):
        if hunk := _HUNK.match(line):
            first = next(after for after in range(at + 1, len(lines)) if lines[after][0] in scopes)
            sign = lines[first][0]
            number = int(hunk[1] if sign == "-" else hunk[2]) + first - at - 1
            lines[at] = f"@@ {_innermost(scopes[sign], number)} @@\n"
    return "".join(lines)


def _scopes(text: str) -> list[_Scope]:
    """Return first line, last line and qualified name of every class and function, outer ones first."""

    def inside(node: ast.AST, prefix: str) -> Iterator[_Scope]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                start = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                yield start, child.end_lineno or start, prefix + child.name
                yield from inside(child, f"{prefix}{child.name}.")
            else:
                yield from inside(child, prefix)

    return list(inside(ast.parse(text), "")) if text else []


def _innermost(scopes: list[_Scope], line: int) -> str:
    return next((name for start, end, name in reversed(scopes) if start <= line <= end), MODULE)


def findings(version: str, rendered: dict[str, Golden], root: Path = GOLDEN) -> Iterator[str]:
    """Yield what is wrong with the goldens of one release, the cause before its consequences."""
    tree = read(root)
    yield from _unreadable(tree)
    held = {target: entries[version] for target, entries in tree.locks.items() if version in entries}
    both = sorted(rendered.keys() & held.keys())
    for target in both:
        found, expected = rendered[target].entry["upstream_sha256"], held[target]["upstream_sha256"]
        if found != expected:
            yield (
                f"upstream source is not the pinned one: {rendered[target].entry['file']} has sha256 {found}, the "
                f"golden was made from {expected}. What follows is a consequence."
            )
    for target in sorted(rendered.keys() - held.keys() - tree.unreadable.keys()):
        yield f"missing: golden/{target}/{LOCK} has no TRL {version}"
    for target in sorted(held.keys() - rendered.keys()):
        yield f"orphan: golden/{target}/{LOCK} has TRL {version}, where that target is no patched file"
    for target in both:
        was, now = held[target], rendered[target]
        diff = tree.diff(target, version)
        if _shown(was) != _shown(now.entry):
            yield f"stale: golden/{target}/{LOCK}, TRL {version}\n{_excerpt(_shown(was), _shown(now.entry))}"
        if diff is None:
            yield f"missing: golden/{target}/{was['diff']}, which {LOCK} names for TRL {version}"
        elif diff != now.diff:
            name = was["diff"] or f"{LOCK} names no diff"
            yield f"stale: golden/{target}/{name}, TRL {version}\n{_excerpt(diff, now.diff)}"


def tree_findings(pinned: Collection[str], root: Path = GOLDEN) -> Iterator[str]:
    """Yield what is wrong with golden/ whatever the rewriter does: what belongs to nothing, and what is misnamed."""
    tree = read(root)
    yield from _unreadable(tree)
    for name, releases in tree.missing():
        yield f"missing: golden/{name}, which {LOCK} names for TRL {', '.join(releases)}"
    named = {f"{target}/{LOCK}" for target in tree.locks.keys() | tree.unreadable.keys()}
    for target, entries in tree.locks.items():
        named |= {f"{target}/{entry['diff']}" for entry in entries.values()}
        for release in sorted(entries.keys() - set(pinned)):
            yield f"orphan: golden/{target}/{LOCK} has TRL {release}, which golden/releases.toml does not pin"
    for name in sorted(tree.files.keys() - named):
        if name.split("/")[0] not in tree.unreadable:
            yield f"orphan: golden/{name} is named by no {LOCK}"
    laid_out = layout(tree.goldens(set(pinned)))
    intact = tree.locks.keys() - {name.split("/")[0] for name, _ in tree.missing()}
    for name in (f"{target}/{LOCK}" for target in sorted(intact)):
        if laid_out.get(name) != tree.files[name]:
            yield (
                f"stale: golden/{name} is not laid out as updating does it: oldest release first, and each distinct "
                f"diff once, named by the first release that has it\n"
                f"{_excerpt(tree.files[name], laid_out.get(name, ''))}"
            )


def _unreadable(tree: Tree) -> Iterator[str]:
    for target, reason in tree.unreadable.items():
        yield f"unreadable: golden/{target}/{LOCK}: {reason}"


def _shown(entry: Entry) -> str:
    return "\n".join(f"{key}: {json.dumps(entry[key], indent=1)}" for key in (*RELEASE, *PLAN))


def _excerpt(golden: str, rendered: str) -> str:
    lines = list(difflib.unified_diff(golden.splitlines(), rendered.splitlines(), "golden", "now", n=1, lineterm=""))
    more = [f"... and {len(lines) - SHOWN_LINES} lines more"] if len(lines) > SHOWN_LINES else []
    return "\n".join(lines[:SHOWN_LINES] + more)
