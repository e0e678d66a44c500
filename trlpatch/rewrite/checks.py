"""Output checks: what must hold of patched text before it may run. Each returns findings; none raises or prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from trlpatch.outcomes import MODULE
from trlpatch.rewrite.edits import HOOKS, MARKER
from trlpatch.rewrite.outline import Outline
from trlpatch.rewrite.scopes import bound_names, free_names, read_names
from trlpatch.source.syntax import blocks, imported_names

_IMPORT_LINES = frozenset({f"{MARKER}hooks\n", f"import trlpatch.hooks as {HOOKS}\n"})


def problems(upstream: Outline, patched: Outline, touched: frozenset[str]) -> list[str]:
    """Return what is wrong with `patched`.

    It must compile; differ from upstream only inside `touched`; keep every signature and comment; and use no name
    that is neither bound nor used in that scope upstream: what only a lambda or a nested function binds or reads is
    not known in the function around it. At module level, a statement may only be replaced by one that calls a hook,
    and no name may be lost.
    """
    try:
        compile(patched.tree, "<patched>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return [f"does not compile: {error}"]
    replaced = _replaced(upstream, patched) if MODULE in touched else []
    return [
        *_outside(upstream, patched, touched, replaced),
        *_inside(upstream, patched, touched),
        *_at_module_level(upstream, patched, replaced),
    ]


def _outside(
    upstream: Outline, patched: Outline, touched: frozenset[str], replaced: list[tuple[ast.stmt, ast.stmt]]
) -> Iterator[str]:
    known = frozenset(listing.last_name for listing in upstream.fields)
    before = _untouched_lines(upstream, touched, known, [old for old, _ in replaced])
    if before != _untouched_lines(patched, touched, known, [new for _, new in replaced]):
        yield f"text outside {', '.join(sorted(touched))} changed"


def _untouched_lines(
    file: Outline, touched: frozenset[str], known_fields: frozenset[str], replaced: list[ast.stmt]
) -> list[str]:
    """Return the lines outside `touched`, without blank lines, the import of the hooks and an appended last field."""
    hidden: set[int] = set()
    for statement in replaced:
        hidden.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
        marks = statement.lineno - 1
        while marks and file.lines[marks - 1].lstrip().startswith(MARKER):
            hidden.add(marks)
            marks -= 1
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
        unknown = read_names(function.node) - read_names(original.node) - bound_names(function.node) - {HOOKS}
        if unknown:
            yield f"{function.qualname}: {', '.join(sorted(unknown))} is not bound there"
        lost = _comments(upstream, original.first, original.last) - _comments(patched, function.first, function.last)
        if lost:
            yield f"{function.qualname}: comments were lost: {', '.join(sorted(lost))}"


def _replaced(upstream: Outline, patched: Outline) -> list[tuple[ast.stmt, ast.stmt]]:
    """Pair the simple statements at module level that differ; what was added or removed shows as changed text."""
    before, after = _simple(upstream.module.body), _simple(patched.module.body)
    after = [statement for statement in after if ast.unparse(statement) != f"import trlpatch.hooks as {HOOKS}"]
    return [(old, new) for old, new in zip(before, after, strict=False) if ast.dump(old) != ast.dump(new)]


def _simple(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements of `body` and of the blocks in it that hold no statements themselves."""
    found: list[ast.stmt] = []
    for statement in body:
        inner = [child for block in blocks(statement) for child in block]
        found += _simple(inner) if inner else [statement]
    return found


def _at_module_level(upstream: Outline, patched: Outline, replaced: list[tuple[ast.stmt, ast.stmt]]) -> Iterator[str]:
    for old, new in replaced:
        if HOOKS not in free_names([new]):
            yield f"{MODULE}: line {new.lineno} changed and calls no hook"
        if unknown := free_names([new]) - free_names([old]) - {HOOKS}:
            yield f"{MODULE}: {', '.join(sorted(unknown))} is not used there upstream"
    lost = _bound_by_imports(upstream) - _bound_by_imports(patched) if replaced else set()
    targets = [target for _, new in replaced for target in getattr(new, "targets", [])]
    lost -= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if lost:
        yield f"{MODULE}: no longer binds {', '.join(sorted(lost))}"


def _bound_by_imports(file: Outline) -> set[str]:
    return {name for node in _simple(file.module.body) for name in imported_names(node)}


def _signature(node: ast.FunctionDef) -> str:
    return f"{ast.dump(node.args)}{[ast.dump(decorator) for decorator in node.decorator_list]}"


def _comments(file: Outline, first: int, last: int) -> set[str]:
    return {line.strip() for line in file.lines[first - 1 : last] if line.lstrip().startswith("#")}
