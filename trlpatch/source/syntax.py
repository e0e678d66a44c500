"""Syntax tree helpers: the statement lists of an `ast` node, and the names it binds and loads."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the statement lists directly in `node`, in source order, those of its handlers and cases included."""
    for _, value in ast.iter_fields(node):
        if not isinstance(value, list):
            continue
        yield from (child.body for child in value if isinstance(child, ast.ExceptHandler | ast.match_case))
        if statements := [child for child in value if isinstance(child, ast.stmt)]:
            yield statements


def nested_blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield every statement list inside `node`, outer ones first."""
    for block in blocks(node):
        yield block
        for statement in block:
            yield from nested_blocks(statement)


def loaded_names(node: ast.AST) -> set[str]:
    """Return the names that are read anywhere in `node`."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stored_names(node: ast.AST) -> set[str]:
    """Return the names that are assigned anywhere in `node`, without imports and parameters."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def imported_names(node: ast.stmt) -> set[str]:
    """Return the names that an import statement binds; none for any other statement."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
