"""Outline of a source file, made with `ast`: the functions that patches may touch, and the statements in them.

Only the statements that hold an anchor are given to libcst. Parsing and walking whole trainers with it takes 3 s CPU
for the targets of TRL 1.16.0, and `ast` is seven times faster; what is never given to libcst cannot change.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from trlpatch.outcomes import FIELDS, MODULE
from trlpatch.rewrite.tree import Tree
from trlpatch.source.syntax import blocks

_WRAPPER = "class _:\n"

_SIGNS = (ast.Call, ast.Expr, ast.Assign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef)
"""Types of nodes that a sign of an anchor can be."""


@dataclass(frozen=True)
class Function:
    """A method of a target's class, a function of a helper module, or the module level.

    Attributes:
        qualname: such as `GRPOTrainer.__init__`; `MODULE` for the module level.
        first, last: first line, decorators included, and last line, counted from 1.
    """

    qualname: str
    node: ast.FunctionDef
    first: int
    last: int

    @property
    def name(self) -> str:
        """The name without its class."""
        return self.node.name

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters, without `*args` and `**kwargs`."""
        return _parameters(self.node)

    @property
    def body(self) -> list[ast.stmt]:
        """The statements after the docstring."""
        has_docstring = ast.get_docstring(self.node, clean=False) is not None
        return self.node.body[1:] if has_docstring else self.node.body


@dataclass(frozen=True)
class Region:
    """One statement of a function, as whole lines of the file.

    Attributes:
        function: qualified name of the function of the outline it belongs to.
        parameters: parameters of the innermost function around it.
        inner: name of the innermost function around it.
    """

    function: str
    inner: str
    parameters: frozenset[str]
    first: int
    last: int
    text: str

    def parse(self) -> cst.Module:
        """Parse the statement; an indented one inside a block of its own.

        Raises:
            libcst.ParserSyntaxError: `ast` can parse the statement and libcst cannot.
        """
        return cst.parse_module(self._wrapper + self.text)

    def unparse(self, module: cst.Module) -> str:
        """Return the text of a module that `parse` made."""
        return module.code.removeprefix(self._wrapper)

    @property
    def _wrapper(self) -> str:
        return _WRAPPER if self.text[:1].isspace() else ""


@dataclass(frozen=True)
class FieldList:
    """The annotated fields of a dataclass; the last one is `last_name`, from line `first` to line `last`."""

    qualname: str
    last_name: str
    first: int
    last: int
    indent: str


@dataclass(frozen=True)
class Outline:
    """What patches need to know of a file's shape.

    Attributes:
        module: the module level as one function, whose body is every statement but classes and functions.
        import_line: line, counted from 1, before which an import may stand: after the docstring and `__future__`.
    """

    tree: ast.Module
    lines: tuple[str, ...]
    functions: tuple[Function, ...]
    fields: tuple[FieldList, ...]
    module: Function
    import_line: int

    @cached_property
    def parents(self) -> Tree:
        """The tree in which every node knows its parent."""
        return Tree(self.tree)

    @cached_property
    def nodes(self) -> tuple[ast.stmt | ast.expr, ...]:
        """Every node of the file that the sign of an anchor can be, in whatever class, function or block it stands."""
        return tuple(self.parents.of(*_SIGNS))

    def matching(self, sign: Callable[[ast.AST], bool] | None) -> Iterator[ast.stmt | ast.expr]:
        """Yield the nodes that the sign of an anchor accepts."""
        if sign is not None:
            yield from (node for node in self.nodes if sign(node))

    @cached_property
    def prose(self) -> frozenset[int]:
        """Lines of docstrings and of other strings that are statements."""
        strings = (n for n in self.nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
        return frozenset(line for n in strings for line in range(n.lineno, (n.end_lineno or n.lineno) + 1))

    def scope(self, line: int) -> tuple[str, int]:
        """Return the innermost class or function around a line and its own first line; ("", 0) at module level."""
        return next(reversed([*_scopes(self.tree.body, line, "")]), ("", 0))

    def text(self, first: int, last: int) -> str:
        """Return lines `first` to `last`, both included."""
        return "".join(self.lines[first - 1 : last])

    def indent(self, line: int) -> str:
        """Return the leading white space of a line."""
        text = self.lines[line - 1]
        return text[: len(text) - len(text.lstrip())]

    def regions(self, function: Function, holds: Callable[[str], bool]) -> list[Region]:
        """Return the innermost statements of `function` whose own lines satisfy `holds`."""
        if not holds(self.text(function.first, function.last)):
            return []
        found = {
            (region.first, region.last): region
            for region in self._search(function, function.node, function.node.body, holds)
        }
        return list(found.values())

    def _search(
        self, function: Function, inner: ast.FunctionDef, body: list[ast.stmt], holds: Callable[[str], bool]
    ) -> Iterator[Region]:
        for statement in body:
            last = statement.end_lineno or statement.lineno
            if not holds(self.text(statement.lineno, last)):
                continue
            inner_blocks = list(blocks(statement))
            if inner_blocks and not holds(self.text(statement.lineno, inner_blocks[0][0].lineno - 1)):
                deeper = statement if isinstance(statement, ast.FunctionDef) else inner
                for block in inner_blocks:
                    yield from self._search(function, deeper, block, holds)
            else:
                text = self.text(statement.lineno, last)
                yield Region(function.qualname, inner.name, _parameters(inner), statement.lineno, last, text)


def outline(text: str, classes: tuple[str, ...]) -> Outline:
    """Outline `text`: the methods and fields of `classes`, or the module's functions when there are none.

    Raises:
        SyntaxError: `text` is not Python.
    """
    tree = ast.parse(text)
    # str.splitlines also breaks at form feeds and the like, where Python's own line numbers do not.
    lines = tuple(io.StringIO(text, newline="\n"))
    functions: list[Function] = []
    fields: list[FieldList] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            functions += [_function(f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef)]
            annotated = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            if annotated and isinstance(annotated[-1].target, ast.Name):
                last = annotated[-1]
                end = last.end_lineno or last.lineno
                name = annotated[-1].target.id
                fields.append(FieldList(f"{node.name}{FIELDS}", name, last.lineno, end, " " * last.col_offset))
        elif isinstance(node, ast.FunctionDef) and not classes:
            functions.append(_function(node.name, node))
    return Outline(tree, lines, tuple(functions), tuple(fields), _module(tree, len(lines)), _import_line(tree))


def _module(tree: ast.Module, last: int) -> Function:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = [node for node in tree.body if not isinstance(node, definitions)]
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return Function(MODULE, ast.FunctionDef(MODULE, nothing, body, decorator_list=[]), 1, last)


def _function(qualname: str, node: ast.FunctionDef) -> Function:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return Function(qualname, node, first, node.end_lineno or node.lineno)


def _parameters(node: ast.FunctionDef) -> frozenset[str]:
    every = node.args
    return frozenset(arg.arg for arg in [*every.posonlyargs, *every.args, *every.kwonlyargs])


def _scopes(body: list[ast.stmt], line: int, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the classes and functions around a line, outer ones first."""
    for statement in body:
        if not statement.lineno <= line <= (statement.end_lineno or statement.lineno):
            continue
        inner = prefix
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{statement.name}."
            yield f"{prefix}{statement.name}", statement.lineno
        for block in blocks(statement):
            yield from _scopes(block, line, inner)


def _import_line(tree: ast.Module) -> int:
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future:
            decorators: list[ast.expr] = getattr(node, "decorator_list", [])
            return min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return 1
