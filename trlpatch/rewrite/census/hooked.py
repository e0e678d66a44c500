"""What patched text looks like to the census: calls of hooks, and where a sync method returns early."""

from __future__ import annotations

import ast

from trlpatch.rewrite.edits import HOOKS
from trlpatch.rewrite.tree import Function
from trlpatch.trl_names import SYNC_METHODS


def hook_called(node: ast.AST | None) -> str:
    """Return the name of the hook that `node` calls, empty if it calls none."""
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == HOOKS:
        return function.attr
    return ""


def early_return(function: Function) -> ast.If | None:
    """Return the statement at which a patched sync method returns early."""
    if function.name not in SYNC_METHODS:
        return None
    return next((s for s in function.body if isinstance(s, ast.If) and hook_called(s.test) == "hand_over"), None)
