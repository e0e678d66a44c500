"""Edit helpers that patches share: libcst transformers of calls, and insertion of statements by line.

Transformers are plain `CSTTransformer`s that test the updated node by type: matcher decorators cost four times a walk
(LibCST #880) and test the original node, not the updated one (LibCST #888).
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.outline import Function, Outline, Region
from trlpatch.trl_names import ENGINE_ATTRIBUTES

HOOKS = "_trlpatch"
"""Name under which patched modules import `trlpatch.hooks`."""

MARKER = "# trlpatch: "
"""Every edited or inserted statement has this comment above it, with the patch's name."""


class PatchTransformer(cst.CSTTransformer):
    """Base of a patch's transformer; it sees one statement and counts the anchors it consumes.

    What is already patched must be left alone and not be counted, so that a second pass finds nothing.
    """

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region
        self.hits: Counter[Anchor] = Counter()

    def edit_call(self, node: cst.Call) -> cst.Call:
        """Return `node` or its replacement; called for every call of the statement, inner ones first."""
        return node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        return self.edit_call(updated_node)


@dataclass(frozen=True)
class Insertion:
    """Whole statements to put in before a line; the marker and the indentation are added by the rewriter.

    Attributes:
        function: qualified name of the function or field list they become part of.
        line: line, counted from 1, before which they go.
    """

    anchor: Anchor
    function: str
    line: int
    indent: str
    statements: str


def calls_hook(statement: ast.stmt | None, name: str) -> bool:
    """Tell whether a statement is the bare call `_trlpatch.<name>(...)`."""
    return isinstance(statement, ast.Expr) and is_hook_call(statement.value, name)


def is_hook_call(node: ast.expr, name: str) -> bool:
    """Tell whether an `ast` expression is a call of the hook `name`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"{HOOKS}.{name}"


def engine_call(node: ast.AST, *methods: str) -> ast.Call | None:
    """Return `node` if it calls one of `methods` on an attribute or a name that holds an engine."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods):
        return None
    return node if last_name(node.func.value) in ENGINE_ATTRIBUTES else None


def last_name(node: ast.AST | None) -> str:
    """Return `c` for the expression `a.b.c` or for the name `c`, else an empty text."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def calls(node: ast.AST, name: str) -> bool:
    """Tell whether `node` is a call of the class or function `name`, also as `module.name(...)`."""
    return isinstance(node, ast.Call) and last_name(node.func) == name


def imports_from(node: ast.AST, module: str, name: str = "") -> bool:
    """Tell whether `node` is `from <module> import ...`, of `name` if one is given."""
    if not isinstance(node, ast.ImportFrom) or node.module != module or node.level:
        return False
    return not name or any(alias.name == name for alias in node.names)


def before(file: Outline, function: Function, statement: ast.stmt, anchor: Anchor, statements: str) -> Insertion:
    """Insert before `statement`, above the comments that belong to it."""
    line = statement.lineno
    while line > function.node.lineno + 1 and file.lines[line - 2].lstrip().startswith("#"):
        line -= 1
    return Insertion(anchor, function.qualname, line, file.indent(statement.lineno), statements)


def after(file: Outline, function: Function, statement: ast.stmt, anchor: Anchor, statements: str) -> Insertion:
    """Insert right after `statement`."""
    line = (statement.end_lineno or statement.lineno) + 1
    return Insertion(anchor, function.qualname, line, file.indent(statement.lineno), statements)


def hook(name: str, *arguments: cst.BaseExpression) -> cst.Call:
    """Return the expression `_trlpatch.<name>(<arguments>)`."""
    return cst.Call(
        func=cst.Attribute(value=cst.Name(HOOKS), attr=cst.Name(name)),
        args=[cst.Arg(value=argument.deep_clone()) for argument in arguments],
    )


def is_hook(node: cst.BaseExpression, name: str) -> bool:
    """Tell whether `node` is a call of the hook `name`."""
    return (
        isinstance(node, cst.Call)
        and isinstance(node.func, cst.Attribute)
        and isinstance(node.func.value, cst.Name)
        and node.func.value.value == HOOKS
        and node.func.attr.value == name
    )


def engine_method(node: cst.Call, *methods: str) -> tuple[cst.BaseExpression, cst.BaseExpression] | None:
    """Return (owner, engine) if `node` calls one of `methods` on an in-process engine, else None.

    An engine is any attribute named `llm` or `vllm_engine`, whatever it hangs on: `self.llm`, `trainer.llm`,
    `trainer.vllm_generation.llm`, `self.vllm_engine`. Its owner is what it hangs on.
    """
    method = node.func
    if not isinstance(method, cst.Attribute) or method.attr.value not in methods:
        return None
    engine = method.value
    if not isinstance(engine, cst.Attribute) or engine.attr.value not in ENGINE_ATTRIBUTES:
        return None
    return engine.value, engine


def keyword(node: cst.Call, name: str) -> cst.Arg | None:
    """Return the keyword argument `name` of a call, if it has one."""
    return next((arg for arg in node.args if arg.keyword is not None and arg.keyword.value == name), None)


def bound_to_hook(value: cst.BaseExpression, *names: str) -> cst.Assign:
    """Return the statement `<names> = <value>`, which stands where upstream imported `names`."""
    bound = [cst.Name(name) for name in names]
    target = bound[0] if len(bound) == 1 else cst.Tuple([cst.Element(name) for name in bound], lpar=[], rpar=[])
    return cst.Assign(targets=[cst.AssignTarget(target)], value=value)


def imports(node: cst.ImportFrom, module: str, *names: str) -> bool:
    """Tell whether `node` is `from <module> import <names>` and nothing else."""
    if isinstance(node.names, cst.ImportStar) or any(alias.asname is not None for alias in node.names):
        return False
    imported = tuple(dotted(alias.name) for alias in node.names)
    return dotted(node.module) == module and imported == names and not node.relative


def dotted(node: cst.CSTNode | None) -> str:
    """Return `a.b.c` for a name or a chain of attributes, else an empty text."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr.value}"
    return ""


def is_text(node: cst.BaseExpression, value: str) -> bool:
    """Tell whether `node` is the plain string literal `value`."""
    return isinstance(node, cst.SimpleString) and node.evaluated_value == value


def is_key(element: cst.BaseDictElement, name: str) -> bool:
    """Tell whether `element` is the entry `name` of a dictionary display."""
    return isinstance(element, cst.DictElement) and is_text(element.key, name)


def with_keyword(node: cst.Call, name: str, value: cst.BaseExpression) -> cst.Call:
    """Return the call with `name=value` set: in place if the keyword is there, else appended."""
    existing = keyword(node, name)
    if existing is not None:
        changed = existing.with_changes(value=value)
        return node.with_changes(args=[changed if arg is existing else arg for arg in node.args])
    added = cst.Arg(
        keyword=cst.Name(name),
        value=value,
        equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
    )
    return with_argument(node, added)


def with_argument(node: cst.Call, added: cst.Arg) -> cst.Call:
    """Return the call with a keyword argument, or `**` of some, appended.

    It keeps the call's layout: on its own line with the same indentation where the last argument has its own line, a
    trailing comma where there was one. `**kwargs` may stand before it.
    """
    if not node.args:
        return node.with_changes(args=[added])
    *before, last = node.args
    if isinstance(last.value, cst.GeneratorExp) and not last.value.lpar:
        # A bare generator may only be a call's sole argument.
        last = last.with_deep_changes(last.value, lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    if isinstance(last.comma, cst.Comma):
        closing = last.comma.whitespace_after
        if isinstance(closing, cst.ParenthesizedWhitespace):
            # The comment after the last argument, if any, stays with it.
            between = cst.Comma(whitespace_after=_argument_break(node, closing))
            after = cst.Comma(
                whitespace_after=closing.with_changes(first_line=cst.TrailingWhitespace(), empty_lines=[])
            )
        else:
            between, after = _comma_space(), last.comma
        return node.with_changes(args=[*before, last.with_changes(comma=between), added.with_changes(comma=after)])
    return node.with_changes(
        args=[
            *before,
            last.with_changes(comma=_comma_space(), whitespace_after_arg=cst.SimpleWhitespace("")),
            added.with_changes(whitespace_after_arg=last.whitespace_after_arg),
        ]
    )


def _comma_space() -> cst.Comma:
    return cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))


def _argument_break(node: cst.Call, closing: cst.ParenthesizedWhitespace) -> cst.ParenthesizedWhitespace:
    """Return `closing` with the indentation of the call's arguments instead of its closing parenthesis."""
    breaks = [
        node.whitespace_before_args,
        *(a.comma.whitespace_after for a in node.args if isinstance(a.comma, cst.Comma)),
    ]
    first = next((space for space in breaks if isinstance(space, cst.ParenthesizedWhitespace)), closing)
    return closing.with_changes(indent=first.indent, last_line=first.last_line)
