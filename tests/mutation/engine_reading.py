"""Census oracle: read every use of an engine in patched text with `ast`, and name each that is not in a known form.

Shares no code with trlpatch. What the executed oracle cannot reach (a branch, a callback, a string) is seen here.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator

from tests.mutation.hosts import ENGINES, SYNCS, parsed

HOOKS = "_trlpatch"
ON_ENGINE = frozenset({"lora_request", "sleep", "wake_up", "reload_weights"})
WORKER_MODEL = ("llm_engine", "model_executor", "driver_worker", "model_runner", "model")
HARMLESS_CALLS = frozenset({"reset_prefix_cache", "reset_mm_cache", "get_tokenizer"})
CONFIGURATION = frozenset({"model_config", "vllm_config"})
PUSHES = frozenset({"load_weights", "update_weights", "load_state_dict", "apply_model"})
ENGINE_CLASSES = frozenset({"LLM", "LLMEngine", "AsyncLLM", "AsyncLLMEngine", "EngineCore", "EngineCoreClient"})


WORDS = (*ENGINES, *ENGINE_CLASSES, *PUSHES, "vllm", HOOKS)
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef)


def judge(text: str, *others: str) -> list[str]:
    """Return what is wrong with `text`; `others` are texts of files that may call its sync helpers."""
    reading = _Reading(_relevant(text), [parsed(other) for other in others])
    return [*reading.engines(), *reading.classes(), *reading.pushes()]


def _relevant(text: str) -> ast.Module:
    """Parse `text`, and keep the statements that name an engine or push, or a function that does; walking is dear."""
    lines = text.splitlines()
    every = [
        (owner, node, "\n".join(lines[_first(node) - 1 : node.end_lineno]))
        for owner in parsed(text).body
        for node in (owner.body if isinstance(owner, ast.ClassDef) else [owner])
    ]
    words, known = set(WORDS), 0
    while len(words) != known:
        known = len(words)
        search = re.compile(rf"\b({'|'.join(sorted(words))})\b").search
        kept = [(owner, node, chunk) for owner, node, chunk in every if search(chunk)]
        pushing = re.compile(rf"\b({'|'.join(sorted((words - set(WORDS)) | PUSHES))})\b").search
        words |= {
            d.name for _, node, chunk in kept if pushing(chunk) for d in ast.walk(node) if isinstance(d, DEFINED)
        }
    found: dict[ast.stmt, ast.stmt] = {}
    for owner, node, _ in kept:
        if isinstance(owner, ast.ClassDef):
            if owner not in found:
                found[owner] = copy.copy(owner)
                found[owner].body = []  # type: ignore[attr-defined]
            found[owner].body.append(node)  # type: ignore[attr-defined]
        else:
            found[owner] = owner
    return ast.Module(list(found.values()), [])


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


class _Reading:
    def __init__(self, tree: ast.Module, others: list[ast.Module]) -> None:
        self.tree, self.others = tree, others
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.pushing: list[ast.AST] = []

    # Every read of an engine.

    def engines(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and node.attr in ENGINES:
                if isinstance(node.ctx, ast.Store):
                    yield from self._stored(node)
                elif isinstance(node.ctx, ast.Del):
                    continue  # whoever reads it afterwards fails loudly
                elif fault := self._read(node):
                    yield f"line {node.lineno}: {fault}"
            elif isinstance(node, ast.Constant) and node.value in ENGINES and not self._is_question(node):
                yield f"line {node.lineno}: an engine by the name {node.value!r}"

    def _stored(self, node: ast.Attribute) -> Iterator[str]:
        statement = self._statement(node)
        value = getattr(statement, "value", None)
        built = isinstance(value, ast.Call) and isinstance(value.func, ast.Call) and _hook(value.func) == "engine"
        nothing = isinstance(value, ast.Constant) and value.value is None
        if not built and not nothing and value is not None:
            yield f"line {node.lineno}: an engine that is not from the hook: {ast.unparse(statement)[:80]}"

    def _read(self, node: ast.Attribute) -> str:
        parent = self.parents[node]
        if isinstance(parent, ast.Call) and _hook(parent) in ON_ENGINE and parent.args[1:2] == [node]:
            owner = ast.unparse(parent.args[0])
            return "" if owner == ast.unparse(node.value) else f"its owner is not {owner}"
        if isinstance(parent, ast.Call) and _hook(parent) == "prompt_limit":
            return ""  # reads its configuration
        if isinstance(parent, ast.Compare) and isinstance(parent.comparators[0], ast.Constant):
            return "" if parent.comparators[0].value is None else "compared"
        chain, top = self._chain(node)
        above = self.parents[top]
        called = isinstance(above, ast.Call) and above.func is top
        if chain[:5] == WORKER_MODEL:
            return self._worker_model(chain[5:], top, called)
        if called and chain in {("generate",), ("chat",)}:
            return self._rollout(node, above)
        if called and len(chain) == 1 and chain[0] in HARMLESS_CALLS:
            return ""
        if not called and len(chain) > 1 and chain[0] == "llm_engine" and chain[1] in CONFIGURATION:
            return ""
        return f"unknown use of an engine: {ast.unparse(above if called or not chain else top)[:80]}"

    def _rollout(self, engine: ast.Attribute, call: ast.AST) -> str:
        assert isinstance(call, ast.Call)
        given = [keyword.value for keyword in call.keywords if keyword.arg == "lora_request"]
        if len(given) != 1 or _hook(given[0]) != "lora_request":
            return f"a rollout without the live adapter: {ast.unparse(call)[:80]}"
        return ""  # the engine in the hook's arguments is read on its own

    def _worker_model(self, chain: tuple[str, ...], top: ast.AST, called: bool) -> str:
        if called and chain == ("load_weights",):
            self.pushing.append(top)
            return ""
        statement = self._statement(top)
        if not chain and isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            for use in ast.walk(self._function(statement)):
                if isinstance(use, ast.Name) and use.id == name and isinstance(use.ctx, ast.Load):
                    attribute = self.parents[use]
                    if not (isinstance(attribute, ast.Attribute) and attribute.attr == "load_weights"):
                        return f"unknown use of the engine's model: {ast.unparse(attribute)[:80]}"
                    self.pushing.append(use)
            return ""
        return f"unknown use of the engine's model: {ast.unparse(statement)[:80]}"

    def _chain(self, node: ast.AST) -> tuple[tuple[str, ...], ast.AST]:
        names: list[str] = []
        while isinstance(parent := self.parents[node], ast.Attribute):
            names.append(parent.attr)
            node = parent
        return tuple(names), node

    def _is_question(self, node: ast.Constant) -> bool:
        parent = self.parents[node]
        if isinstance(parent, ast.Call) and ast.unparse(parent.func) == "hasattr":
            return True
        return isinstance(parent, (ast.Compare, ast.Expr, ast.Dict, ast.JoinedStr, ast.List)) or (
            isinstance(parent, ast.Call) and "logger" in ast.unparse(parent.func)
        )

    # Every name of an engine's class.

    def classes(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    if alias.name in ENGINE_CLASSES and (alias.asname or alias.name != "LLM"):
                        yield f"line {node.lineno}: another engine is imported: {alias.name}"
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if name in ENGINE_CLASSES and isinstance(getattr(node, "ctx", None), ast.Load):
                parent = self.parents[node]
                built = isinstance(parent, ast.Call) and _hook(parent) == "engine" and isinstance(node, ast.Name)
                asked = isinstance(parent, ast.Call) and ast.unparse(parent.func) == "isinstance"
                if not built and not asked and not self._annotates(node):
                    yield f"line {getattr(node, 'lineno', 0)}: {name} past the hook"

    def _annotates(self, node: ast.AST) -> bool:
        while not isinstance(node, ast.stmt):
            parent = self.parents[node]
            if isinstance(parent, (ast.arg, ast.AnnAssign, ast.FunctionDef)):
                return node in {getattr(parent, "annotation", None), getattr(parent, "returns", None)}
            node = parent
        return False

    # Every push of weights stands behind a hand-over.

    def pushes(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            pushes = isinstance(node, ast.Attribute) and node.attr in PUSHES - {"load_state_dict"}
            if pushes and node not in self.pushing and node.value not in self.pushing:
                yield f"line {node.lineno}: unknown push of weights: {ast.unparse(node)[:80]}"
        for push in self.pushing:
            if not self._guarded(push, set()):
                yield f"line {getattr(push, 'lineno', 0)}: weights are pushed without a hand-over before it"

    def _guarded(self, node: ast.AST, asking: set[str]) -> bool:
        """Is `node` reached only after a hook was asked whether TRL has to push?"""
        function = self._function(node)
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return False
        inner: ast.AST = node
        while inner is not function:
            outer = self.parents[inner]
            either = isinstance(outer, ast.BoolOp) and isinstance(outer.op, ast.Or)
            if either and inner is not outer.values[0] and _hook(outer.values[0]) == "hand_over":
                return True
            if outer is function and inner in function.body:
                earlier = function.body[: function.body.index(inner)]
                if any(_returns_if_handed_over(statement) for statement in earlier):
                    return True
            inner = outer
        if function.name in SYNCS or function.name in asking:
            return function.name in asking
        callers = [*self._mentions(self.tree, function.name)]
        foreign = [use for other in self.others for use in self._mentions(other, function.name)]
        asking = {*asking, function.name}
        return bool(callers) and not foreign and all(self._guarded(use, asking) for use in callers)

    @staticmethod
    def _mentions(tree: ast.Module, name: str) -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            if (
                (isinstance(node, ast.Attribute) and node.attr == name)
                or (isinstance(node, ast.Name) and node.id == name)
                or (isinstance(node, ast.Constant) and node.value == name)
            ):
                yield node

    def _statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def _function(self, node: ast.AST) -> ast.AST:
        while not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Module)):
            node = self.parents[node]
        return node


def _hook(node: ast.AST) -> str:
    """Return the name of the hook that `node` calls."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        value = node.func.value
        return node.func.attr if isinstance(value, ast.Name) and value.id == HOOKS else ""
    return ""


def _returns_if_handed_over(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.If) or _hook(statement.test) != "hand_over":
        return False
    return len(statement.body) == 1 and isinstance(statement.body[0], ast.Return)
