"""A syntax tree with parents: what stands around a node."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from trlpatch.rewrite.edits import HOOKS
from trlpatch.trl_names import SYNC_METHODS

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Tree:
    """A module's syntax tree in which every node knows its parent."""

    def __init__(self, module: ast.Module) -> None:
        self.module = module
        self.nodes: list[ast.AST] = [module]
        self._parents: dict[ast.AST, ast.AST] = {}
        for node in self.nodes:
            children = list(ast.iter_child_nodes(node))
            self._parents.update(dict.fromkeys(children, node))
            self.nodes += children

    def parent(self, node: ast.AST) -> ast.AST | None:
        """Return what `node` is a part of."""
        return self._parents.get(node)

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield what `node` is a part of, from the inside out."""
        current = self._parents.get(node)
        while current is not None:
            yield current
            current = self._parents.get(current)

    def functions(self, node: ast.AST) -> Iterator[Function]:
        """Yield the functions around `node`, inner ones first."""
        return (outer for outer in self.around(node) if isinstance(outer, Function))

    def called(self, node: ast.AST) -> ast.Call | None:
        """Return the call whose callee `node` is."""
        parent = self._parents.get(node)
        return parent if isinstance(parent, ast.Call) and parent.func is node else None

    def chain(self, node: ast.AST) -> list[ast.Attribute]:
        """Return the attributes that follow on `node`: `.b` and `.c` for the `a` of `a.b.c`."""
        found: list[ast.Attribute] = []
        parent = self._parents.get(node)
        while isinstance(parent, ast.Attribute):
            found.append(parent)
            parent = self._parents.get(parent)
        return found

    def annotates(self, node: ast.AST) -> bool:
        """Tell whether `node` is part of an annotation."""
        for outer, inner in zip(self.around(node), (node, *self.around(node)), strict=False):
            if isinstance(outer, ast.arg | ast.AnnAssign) and outer.annotation is inner:
                return True
            if isinstance(outer, Function) and outer.returns is inner:
                return True
            if isinstance(outer, ast.stmt):
                return False
        return False


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
