"""Syntax tree of a file, walked once: every node by its type, with its parent."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

Function = ast.FunctionDef | ast.AsyncFunctionDef
_Node = TypeVar("_Node", bound=ast.AST)


class Tree:
    """A module's syntax tree in which every node knows its parent; without contexts such as `ast.Load`.

    Half of the time of looking at a file is walking it, and `ast.walk` takes three times as long as this.
    """

    def __init__(self, module: ast.Module) -> None:
        self.module = module
        self._parents: dict[ast.AST, ast.AST] = {}
        self._by_type: defaultdict[type[ast.AST], list[ast.AST]] = defaultdict(list)
        nodes: list[ast.AST] = [module]
        for node in nodes:
            self._by_type[type(node)].append(node)
            for name in node._fields:
                value = getattr(node, name, None)
                if isinstance(value, list):
                    children = [child for child in value if isinstance(child, ast.AST)]
                elif isinstance(value, ast.AST) and name != "ctx":
                    children = [value]
                else:
                    continue
                for child in children:
                    self._parents[child] = node
                nodes += children

    def of(self, *types: type[_Node]) -> Iterator[_Node]:
        """Yield the nodes of some types, all of the first one first."""
        for kind in types:
            yield from self._by_type[kind]  # type: ignore[misc]

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
        inner = node
        for outer in self.around(node):
            if isinstance(outer, ast.arg | ast.AnnAssign) and outer.annotation is inner:
                return True
            if isinstance(outer, Function) and outer.returns is inner:
                return True
            if isinstance(outer, ast.stmt):
                return False
            inner = outer
        return False
