"""Scopes of Python, on `ast`: which names a function binds itself, and which its body reads from outside of it.

`ast.walk` does not know scopes: to it, a name that only a lambda, a nested function or a comprehension binds is bound
in the function around it, where reading that name raises NameError.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from trlpatch.source.syntax import imported_names

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def bound_names(function: _Function) -> set[str]:
    """Return the names that `function` binds in its own scope: parameters, assignments, imports, definitions."""
    found = _parameters(function)
    for node in _own(_body(function)):
        found |= _bindings(node)
    return found - _declared(function, ast.Global) - _declared(function, ast.Nonlocal)


def free_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements or expressions of one scope read, without what inner scopes bind themselves."""
    direct, inner = _reads(nodes)
    return direct | inner


def _reads(nodes: Iterable[ast.AST]) -> tuple[set[str], set[str]]:
    """Return the names that a scope reads itself, and those that its inner scopes read from outside of themselves."""
    direct: set[str] = set()
    inner: set[str] = set()
    for node in _own(nodes):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            direct.add(node.id)
        elif isinstance(node, _Function):
            inner |= free_names(_body(node)) - bound_names(node)
        elif isinstance(node, ast.ClassDef):
            # What a class binds, its methods do not see.
            of_class, of_methods = _reads(node.body)
            inner |= of_methods | (of_class - {name for child in _own(node.body) for name in _bindings(child)})
        elif isinstance(node, _Comprehension):
            inner |= _free_in_comprehension(node)
    return direct, inner


def read_names(function: ast.FunctionDef) -> set[str]:
    """Return the names that the body of `function` reads in its own scope, whether it binds them or not."""
    return free_names(function.body)


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes of one scope; of an inner scope its node alone, with what is evaluated outside of it."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _Function):
            waiting += [*node.args.defaults, *(default for default in node.args.kw_defaults if default)]
            waiting += getattr(node, "decorator_list", [])
        elif isinstance(node, ast.ClassDef):
            waiting += [*node.bases, *(word.value for word in node.keywords), *node.decorator_list]
        elif not isinstance(node, _Comprehension):
            waiting += ast.iter_child_nodes(node)


def _bindings(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        return {node.id}
    if isinstance(node, Definition):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return imported_names(node)
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        return {node.name} if node.name else set()
    if isinstance(node, ast.MatchMapping):
        return {node.rest} if node.rest else set()
    if isinstance(node, _Comprehension):
        # PEP 572: `:=` in a comprehension binds in the scope around it.
        return {inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)}
    return set()


def _free_in_comprehension(node: _Comprehension) -> set[str]:
    first = node.generators[0].iter
    parts = [child for child in ast.walk(node) if child is not node]
    bound = {child.id for child in parts if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    return free_names([first]) | (free_names(ast.iter_child_nodes(node)) - bound)


def _body(function: _Function) -> list[ast.AST]:
    return [function.body] if isinstance(function, ast.Lambda) else list(function.body)


def _parameters(function: _Function) -> set[str]:
    every = function.args
    named = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
    return {argument.arg for argument in named if argument is not None}


def _declared(function: _Function, kind: type[ast.Global] | type[ast.Nonlocal]) -> set[str]:
    return {name for node in _own(_body(function)) if isinstance(node, kind) for name in node.names}
