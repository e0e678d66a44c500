"""Uses of an engine in one syntax tree, by a positive rule: whatever is not of a known form is returned.

An engine is what is read from an attribute or a name of `ENGINE_ATTRIBUTES`, or by `getattr` with such a text. Nothing
is followed: an alias, a bound method, an argument, a lambda's parameter, an element of a list are not of a known form
where they are made. On patched text the known forms are those that patches write; on any other, the harmless ones.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trlpatch.rewrite.census.hooked import hook_called
from trlpatch.rewrite.census.pushes import Pushes, pushed_names
from trlpatch.rewrite.census.vocabulary import (
    CONSTRUCTORS,
    ENGINE_ONLY,
    ENGINES,
    GENERATION,
    HARMLESS_CALLS,
    HARMLESS_PATH,
    HELD_CALLS,
    HOLDER,
    MERGES,
    PUSH_PATH,
    ROLLOUTS,
    names_push_helper,
)
from trlpatch.rewrite.edits import HOOKS, calls, engine_call, last_name
from trlpatch.rewrite.patches.rollout.live_adapter import requests_adapter
from trlpatch.rewrite.patches.rollout.sleep import reloads
from trlpatch.rewrite.tree import Tree
from trlpatch.trl_names import SYNC_METHODS


@dataclass(frozen=True)
class Use:
    """A use of an engine that is of no known form; `line` is counted from 1."""

    line: int
    what: str


def unknown_uses(tree: Tree, stock: frozenset[str] | None = frozenset()) -> list[Use]:
    """Return the uses of an engine that are of no known form, in source order.

    Args:
        stock: patches that were left out of this target on purpose: what they would have edited is known, too. None
            means a file that is no target.
    """
    found = _Census(tree, stock or frozenset(), target=stock is not None).run()
    return sorted({Use(getattr(node, "lineno", 1), what) for node, what in found}, key=lambda use: use.line)


_WORDS = ENGINES | ENGINE_ONLY | CONSTRUCTORS
_Found = Iterator[tuple[ast.AST, str]]


class _Census:
    def __init__(self, tree: Tree, stock: frozenset[str], *, target: bool) -> None:
        self._tree = tree
        self._stock = stock
        self._target = target
        self._pushes = Pushes(tree)
        self._explained: set[ast.AST] = set()
        # Asynchronous trainers merge, too, for a server.
        self._synchronises = target or any(node.attr in SYNC_METHODS for node in tree.of(ast.Attribute))

    def run(self) -> _Found:
        names: list[ast.Attribute | ast.Name] = [*self._tree.of(ast.Attribute), *self._tree.of(ast.Name)]
        # Engines first: their forms explain nodes that would be findings by themselves.
        for node in (*names, *self._getattrs()):
            if _reached(node) in ENGINES:
                yield from self._engine(node)
            elif _reached(node) == HOLDER and not isinstance(node, ast.Name):
                yield from self._holder(node)
        for name in names:
            yield from self._named(name)
        for text in self._tree.of(ast.Constant):
            if isinstance(text.value, str):
                yield from self._text(text, text.value)
        for imports in self._tree.of(ast.ImportFrom):
            if _renames(imports):
                yield imports, "a class of vLLM's that makes engines gets another name"

    def _getattrs(self) -> Iterator[ast.Call]:
        return (call for call in self._tree.of(ast.Call) if _reached(call))

    def _engine(self, node: ast.AST) -> _Found:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            return
        parent = self._tree.parent(node)
        if isinstance(parent, ast.Attribute):
            yield from self._member(node, parent)
        elif not (self._asked_about(node) or self._assigned(node, self._builds_engine)):
            yield node, "the engine is handed on under another name, or used in a way that no patch knows"

    def _member(self, engine: ast.AST, member: ast.Attribute) -> _Found:
        chain = self._tree.chain(engine)
        path, call = tuple(link.attr for link in chain), self._tree.called(member)
        self._explained.update(chain)
        if path[: len(PUSH_PATH)] == PUSH_PATH:
            yield from self._model(chain[len(PUSH_PATH) - 1])
        elif path[: len(HARMLESS_PATH)] == HARMLESS_PATH and len(path) > len(HARMLESS_PATH):
            if not isinstance(chain[-1].ctx, ast.Load):
                yield member, "the configuration of the engine is changed"
        elif call is None:
            yield member, f"`.{member.attr}` of the engine is read or handed on, not called"
        elif member.attr in ROLLOUTS:
            if "live_adapter" not in self._stock:
                yield from self._rollout(member, call)
        elif not (member.attr in HARMLESS_CALLS or self._left_to_trl(call)):
            yield member, f"no patch knows what `.{member.attr}(...)` of the engine does to rollouts or weights"

    def _rollout(self, member: ast.Attribute, call: ast.Call) -> _Found:
        if not requests_adapter(call):
            yield member, "a rollout without the LoRA adapter being trained: it names no `lora_request`"
        elif any(word.arg == "lora_request" and len(getattr(word.value, "args", ())) > 2 for word in call.keywords):
            yield member, "TRL hands a LoRA request of its own to this rollout, which no release did"

    def _left_to_trl(self, call: ast.Call) -> bool:
        rpc = engine_call(call, "collective_rpc")
        known = engine_call(call, "sleep", "wake_up") is not None or (rpc is not None and reloads(rpc))
        return known and "sleep" in self._stock

    def _model(self, model: ast.Attribute) -> _Found:
        parent = self._tree.parent(model)
        if isinstance(parent, ast.Assign) and [type(target) for target in parent.targets] == [ast.Name]:
            handle = parent.targets[0]
            assert isinstance(handle, ast.Name)
            for read in pushed_names(self._tree, handle):
                yield from self._pushed(read)
        else:
            yield from self._pushed(model)

    def _pushed(self, model: ast.AST) -> _Found:
        parent = self._tree.parent(model)
        if not (isinstance(parent, ast.Attribute) and parent.attr == "load_weights" and self._tree.called(parent)):
            yield model, "the model inside the engine is used for something else than a weight push"
            return
        self._explained.add(parent)
        if not (self._pushes.guarded(parent) or "adapter_sync" in self._stock):
            yield model, "weights are pushed where handing the adapter over does not prevent it"

    def _holder(self, node: ast.AST) -> _Found:
        member = self._tree.parent(node)
        if not isinstance(member, ast.Attribute):
            if not (self._asked_about(node) or self._assigned(node, self._builds_generation)):
                yield node, f"the trainer's {HOLDER} is handed on under another name"
        elif member.attr in HELD_CALLS:
            if not isinstance(member.ctx, ast.Load):
                yield member, f"`{HOLDER}.{member.attr}` is replaced"
        elif member.attr not in ENGINES and (member.attr.startswith("_") or self._tree.called(member) is not None):
            yield member, f"`.{member.attr}` of {HOLDER} may sample or push past the patched methods"

    def _asked_about(self, node: ast.AST) -> bool:
        """Tell whether `node` is only tested, deleted, or the argument of a hook."""
        parent = self._tree.parent(node)
        if isinstance(parent, ast.Compare):
            return parent.left is node and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
        if isinstance(parent, ast.Call):
            tested = isinstance(parent.func, ast.Name) and parent.func.id in {"bool", "hasattr", "isinstance"}
            return (tested and parent.args[0] is node) or (bool(hook_called(parent)) and node in parent.args)
        if isinstance(parent, ast.UnaryOp):
            return isinstance(parent.op, ast.Not)
        tests = isinstance(parent, ast.If | ast.IfExp | ast.While | ast.Assert) and parent.test is node
        return tests or isinstance(parent, ast.Delete)

    def _assigned(self, node: ast.AST, builds: Callable[[ast.expr], bool]) -> bool:
        parent = self._tree.parent(node)
        if isinstance(parent, ast.Assign):
            value: ast.expr | None = parent.value if parent.targets == [node] else node  # type: ignore[assignment]
        elif isinstance(parent, ast.AnnAssign) and parent.target is node:
            value = parent.value
        else:
            return False
        return value is None or (isinstance(value, ast.Constant) and value.value is None) or builds(value)

    def _builds_engine(self, value: ast.expr) -> bool:
        if isinstance(value, ast.Call) and hook_called(value.func) == "engine":
            return True
        if "engine_reuse" in self._stock and calls(value, "LLM"):
            self._explained.add(value.func)  # type: ignore[attr-defined]
            return True
        return False

    def _builds_generation(self, value: ast.expr) -> bool:
        if isinstance(value, ast.Call) and hook_called(value.func) == "generation":
            return True
        # Elsewhere it lacks vllm_sampling_params and nothing else: its methods are patched whoever builds it.
        return calls(value, GENERATION) and (not self._target or "sampling" in self._stock)

    def _named(self, node: ast.Attribute | ast.Name) -> _Found:
        name = last_name(node)
        if node in self._explained or (isinstance(node, ast.Attribute) and last_name(node.value) == HOOKS):
            return
        if name in CONSTRUCTORS:
            parent = self._tree.parent(node)
            known = hook_called(parent) == "engine" or calls(parent or node, "isinstance")
            if isinstance(node.ctx, ast.Load) and not known and not self._tree.annotates(node):
                yield node, "an engine is built, or its class handed on, where no patch knows of it"
        elif isinstance(node, ast.Attribute) and name in MERGES:
            if self._synchronises and not (self._pushes.guarded(node) or "adapter_sync" in self._stock):
                yield node, f"`.{name}` is called where handing the adapter over does not prevent it"
        elif isinstance(node, ast.Attribute) and name in ENGINE_ONLY:
            yield node, f"`.{name}` is an engine's, and what it is read from has another name"
        elif isinstance(node, ast.Attribute) and names_push_helper(name) and not self._pushes.defines(name):
            yield node, f"`.{name}` is a part of a weight sync, called past the patched sync method"

    def _text(self, node: ast.Constant, text: str) -> _Found:
        parts = _WORDS.intersection(text.split("."))
        if not (parts and text.replace(".", "").isidentifier()) or isinstance(self._tree.parent(node), ast.Expr):
            return
        parent = self._tree.parent(node) or node
        known = calls(parent, "hasattr") or (isinstance(parent, ast.Call) and _reached(parent) == text)
        if not (known or self._left_to_trl_text(node) or self._tree.annotates(node)):
            yield node, f"an engine, or a part of it, may be reached through the text {text!r}"

    def _left_to_trl_text(self, node: ast.Constant) -> bool:
        parent = self._tree.parent(node)
        return isinstance(parent, ast.Call) and self._left_to_trl(parent)


def _renames(node: ast.ImportFrom) -> bool:
    of_vllm = (node.module or "").split(".")[0] == "vllm"
    renamed = any(alias.name in CONSTRUCTORS and alias.asname not in (None, alias.name) for alias in node.names)
    return renamed or (of_vllm and node.names[0].name == "*")


def _reached(node: ast.expr) -> str:
    """Return the name of the attribute or variable that an expression reads, also by `getattr` with a constant."""
    if isinstance(node, ast.Call):
        name = node.args[1] if calls(node, "getattr") and len(node.args) > 1 else None
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
    return last_name(node)
