"""Weight pushes that handing the adapter over prevents: those behind the early return of a sync method alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from trlpatch.rewrite.census.hooked import early_return, hook_called
from trlpatch.rewrite.tree import Function, Tree


class Pushes:
    """Which functions of a file run only behind the early return of a patched sync method.

    These are the private ones that are named nowhere else than in each other and behind that return.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        functions: list[Function] = [*tree.of(ast.FunctionDef), *tree.of(ast.AsyncFunctionDef)]
        self._returns = {function: found for function in functions if (found := early_return(function))}
        self._defined = frozenset(function.name for function in functions)
        self._behind = self._closed() if self._returns else frozenset()

    def defines(self, name: str) -> bool:
        """Tell whether the file has a function of that name."""
        return name in self._defined

    def guarded(self, node: ast.AST) -> bool:
        """Tell whether `node` runs only where the adapter was not handed over."""
        return self._behind_or(node) or self._in(node, self._behind)

    def _behind_or(self, node: ast.AST) -> bool:
        """Tell whether it is in `_trlpatch.hand_over(self) or <node>`."""
        inner = node
        for outer in self._tree.around(node):
            if isinstance(outer, ast.BoolOp) and isinstance(outer.op, ast.Or):
                first = outer.values[0]
                return first is not inner and hook_called(first) == "hand_over"
            inner = outer
            if isinstance(outer, ast.stmt):
                return False
        return False

    def _in(self, node: ast.AST, names: frozenset[str]) -> bool:
        for function in self._tree.functions(node):
            if function in self._returns:
                return _line(node) > (self._returns[function].end_lineno or 0)
            if function.name in names:
                return True
        return False

    def _closed(self) -> frozenset[str]:
        """Return the largest set of private functions that only code behind the return, and they themselves, name."""
        uses: defaultdict[str, list[ast.AST]] = defaultdict(list)
        for node in self._tree.of(ast.Attribute, ast.Name, ast.Constant):
            name = _named(node)
            if name.startswith("_") and name in self._defined:
                uses[name].append(node)
        names = frozenset(uses)
        while True:
            kept = frozenset(name for name in names if all(self._in(use, names) for use in uses[name]))
            if kept == names:
                return names
            names = kept


def pushed_names(tree: Tree, handle: ast.Name) -> Iterator[ast.Name]:
    """Yield where the function around `handle`, a name bound to the engine's model, reads that name."""
    scope = next(tree.functions(handle), tree.module)
    for node in ast.walk(scope):
        if isinstance(node, ast.Name) and node.id == handle.id and isinstance(node.ctx, ast.Load):
            yield node


def _named(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)
