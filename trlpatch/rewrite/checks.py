"""What must hold of patched text before it may run. Each check returns findings; none raises or prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from trlpatch.rewrite.edits import HOOKS, MARKER
from trlpatch.rewrite.regions import Outline

_IMPORT_LINES = frozenset({f"{MARKER}hooks\n", f"import trlpatch.hooks as {HOOKS}\n"})


def problems(upstream: Outline, patched: Outline, touched: frozenset[str]) -> list[str]:
    """Return what is wrong with `patched`.

    It must compile; differ from upstream only inside `touched`; keep every signature and comment; and use no name
    that is neither bound nor used in that function upstream.
    """
    try:
        compile(patched.tree, "<patched>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return [f"does not compile: {error}"]
    return [*_outside(upstream, patched, touched), *_inside(upstream, patched, touched)]


def _outside(upstream: Outline, patched: Outline, touched: frozenset[str]) -> Iterator[str]:
    known = frozenset(listing.last_name for listing in upstream.fields)
    if _untouched_lines(upstream, touched, known) != _untouched_lines(patched, touched, known):
        yield f"text outside {', '.join(sorted(touched))} changed"


def _untouched_lines(file: Outline, touched: frozenset[str], known_fields: frozenset[str]) -> list[str]:
    """Return the lines outside `touched`, without blank lines, the import of the hooks and an appended last field."""
    hidden: set[int] = set()
    for listing in file.fields:
        if listing.qualname in touched and listing.last_name not in known_fields:
            hidden.update(range(listing.first - 1, listing.last + 1))
    for function in file.functions:
        if function.qualname in touched:
            hidden.update(range(function.first, function.last + 1))
    kept = (line for number, line in enumerate(file.lines, 1) if number not in hidden and line.strip())
    return [line for line in kept if line not in _IMPORT_LINES]


def _inside(upstream: Outline, patched: Outline, touched: frozenset[str]) -> Iterator[str]:
    originals = {function.qualname: function for function in upstream.functions}
    for function in patched.functions:
        original = originals.get(function.qualname)
        if original is None or function.qualname not in touched:
            continue
        if _signature(original.node) != _signature(function.node):
            yield f"{function.qualname}: the signature changed"
        unknown = _loaded(function.node) - _loaded(original.node) - _bound(function.node) - {HOOKS}
        if unknown:
            yield f"{function.qualname}: {', '.join(sorted(unknown))} is not bound there"
        lost = _comments(upstream, original.first, original.last) - _comments(patched, function.first, function.last)
        if lost:
            yield f"{function.qualname}: comments were lost: {', '.join(sorted(lost))}"


def _signature(node: ast.FunctionDef) -> str:
    return f"{ast.dump(node.args)}{[ast.dump(decorator) for decorator in node.decorator_list]}"


def _loaded(node: ast.FunctionDef) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bound(node: ast.FunctionDef) -> set[str]:
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def _comments(file: Outline, first: int, last: int) -> set[str]:
    return {line.strip() for line in file.lines[first - 1 : last] if line.lstrip().startswith("#")}
