"""Which names a function binds and reads in its own scope, compared with what the compiler's symbol table says."""

from __future__ import annotations

import ast
import symtable
from textwrap import indent

import pytest

from tests.helpers import source
from trlpatch.rewrite import checks
from trlpatch.rewrite.outline import outline
from trlpatch.rewrite.rewriter import rewrite
from trlpatch.rewrite.scopes import bound_names, free_names, read_names

BODIES = [
    "x = (lambda model: model + y)(z)",
    "x = lambda a, *b, c=d, **e: (a, b, c, e, f)",
    "def inner(model, *rest):\n    return model, outer, rest",
    "async def inner(model=default):\n    await model",
    "def inner():\n    import os\n    return os, sys",
    "def inner():\n    nonlocal a\n    a = b\na = 1",
    "global a\na = b",
    "class Inner(base, key=word):\n    x = y\n    def method(self):\n        return self, x, z",
    "x = [a for a in b if c]",
    "x = {a: b for a, b in c.items() for d in a if d}",
    "x = [last := a for a in b]",
    "x = sum(a * f for a in (lambda q: q)(r))",
    "try:\n    a = 1\nexcept E as error:\n    raise error",
    "with a as b, c as (d, e):\n    pass",
    "for i, (j, *k) in a:\n    pass\nelse:\n    b = i",
    "match a:\n    case {'k': b, **rest}:\n        pass\n    case [c, *d] as e:\n        pass",
    "import a.b as c, d.e\nfrom f import g as h",
    "@decorator(argument)\ndef inner(): ...",
    "x: annotated = a\ny += b\ndel c",
    "if (n := f(a)) > b:\n    pass",
]


@pytest.mark.parametrize("body", BODIES)
def test_scopes_are_those_of_the_symbol_table(body: str):
    text = f"def outer(first, *, second=0):\n{indent(body, '    ')}\n"
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    (table,) = symtable.symtable(text, "<text>", "exec").get_children()
    symbols = {symbol.get_name(): symbol for symbol in table.get_symbols()}
    local = {name for name, symbol in symbols.items() if symbol.is_local()}
    assert bound_names(function) == local
    # The annotation of a local name is not evaluated; the table of Python 3.14 lists it, that of 3.11 does not.
    assert read_names(function) - local - {"annotated"} == _free(table) - {"annotated"}


def _free(table: symtable.SymbolTable) -> set[str]:
    """Return what a scope and those in it read from outside of it."""
    own = {s.get_name() for s in table.get_symbols() if s.is_referenced() and not s.is_local()}
    local = {s.get_name() for s in table.get_symbols() if s.is_local() or s.is_parameter()}
    inner = {name for child in table.get_children() for name in _free(child)}
    return own | (inner - local if table.get_type() == "function" else inner)


def test_what_only_a_lambda_binds_is_free_around_it():
    tree = ast.parse("(lambda model: model)(name), model")
    assert free_names(tree.body) == {"name", "model"}


METHOD = """\
class A:
    def f(self, name):
        short = {}
        return LLM(model=name)
"""


@pytest.mark.parametrize(
    "binds",
    [
        "(lambda model: model.upper())(name)",
        "[model for model in name]",
        "{model: 1 for model in name}",
        "next(model for model in name)",
    ],
)
def test_a_hook_may_not_read_what_only_an_inner_scope_binds(binds: str):
    upstream = METHOD.format(binds)
    patched = upstream.replace("LLM(model", "_trlpatch.engine(self, model, LLM)(model")
    found = checks.problems(outline(upstream, ("A",)), outline(patched, ("A",)), frozenset({"A.f"}))
    assert found == ["A.f: model is not bound there"]


def test_an_engine_that_is_built_where_no_model_is_bound_fails_its_check():
    text = (
        "class VLLMGeneration:\n    def build(self, name):\n        short = (lambda model: model)(name)\n"
        "        self.llm = LLM(model=name)\n"
    )
    failed = rewrite(
        source("vllm_generation", text), (1, 16, 0), skip=frozenset({"sleep", "sampling", "top_k", "image_prompts"})
    ).failed
    assert "VLLMGeneration.build: model is not bound there" in [outcome.reason for outcome in failed]
