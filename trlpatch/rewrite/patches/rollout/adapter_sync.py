"""Sync the adapter alone where TRL merges it and pushes every weight (`sync_weights`).

The definition of the sync method is edited, not its callers: TRL 1.16 has eleven. The early return stands after a
leading wake, because from TRL 1.10 on the only `wake_up(tags=["weights"])` is inside `sync_weights`. Where the hook
declines (server mode, full fine-tuning, an adapter that vLLM cannot express), TRL's own body runs unchanged.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from itertools import takewhile

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import (
    Insertion,
    PatchTransformer,
    after,
    before,
    calls,
    hook,
    is_hook_call,
    last_name,
)
from trlpatch.rewrite.outline import Function, Outline
from trlpatch.rewrite.patch import Patch, exemptions, variants
from trlpatch.trl_names import SYNC_METHODS

SYNC = Anchor(
    "sync_method",
    hint=r"def \w*(sync|vllm)\w*\(",
    sign=lambda node: isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _syncs(node),
)
PUSH = Anchor(
    "state_dict_push",
    hint=r"\.load_weights\(",
    sign=lambda node: isinstance(node, ast.Expr) and _loads_state_dict(node.value),
    prefilter=(".load_weights(",),
)

# Behind a statement that may push: returning before this wake leaves it out, returning after it comes after the push.
LATE_WAKE = Anchor("wake_behind_push", hint=r"wake_up\(")

_IN_VLLM_GENERATION = "weights are synchronised in VLLMGeneration"


def insertions(file: Outline, expected: Collection[Anchor]) -> Iterator[Insertion]:
    """Return early from the sync method, after a leading wake."""
    for function in file.functions:
        if _syncs(function.node):
            yield _early_return(file, function)


def _syncs(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether this is a sync method that does not return early yet."""
    handed_over = any(isinstance(s, ast.If) and is_hook_call(s.test, "hand_over") for s in function.body)
    return function.name in SYNC_METHODS and not handed_over


def _early_return(file: Outline, function: Function) -> Insertion:
    statements = "if _trlpatch.hand_over(self):\n    return"
    leading = list(takewhile(_leads, function.body))
    late = next((s for s in function.body[len(leading) :] if _wakes(s)), None)
    if late is not None:
        return before(file, function, late, LATE_WAKE, statements)
    wakes = [s for s in leading if _wakes(s)]
    if wakes:
        return after(file, function, wakes[-1], SYNC, statements)
    return before(file, function, function.body[0], SYNC, statements)


def _leads(statement: ast.stmt) -> bool:
    """Tell whether a statement may precede the early return: it binds names, or is an `if` that wakes the engine."""
    if isinstance(statement, ast.If) and _wakes(statement):
        return not statement.orelse
    return _binds(statement) and not _wakes(statement)


def _binds(statement: ast.stmt) -> bool:
    # GOLD (0.25-0.29) binds `gather_if_zero3` in both branches of an `if` first.
    if isinstance(statement, ast.If):
        return all(map(_binds, [*statement.body, *statement.orelse]))
    return isinstance(statement, ast.Assign | ast.AnnAssign | ast.Import | ast.ImportFrom)


def _wakes(statement: ast.stmt) -> bool:
    return any(calls(node, "wake_up") for node in ast.walk(statement))


def _loads_state_dict(node: ast.expr) -> bool:
    return calls(node, "load_weights") and any(last_name(inner) == "state_dict" for inner in ast.walk(node))


class GuardedPush(PatchTransformer):
    """Below 0.23 OnlineDPO has no sync method: it pushes the state dict before every rollout."""

    def leave_Expr(self, original_node: cst.Expr, updated_node: cst.Expr) -> cst.Expr:
        call = updated_node.value
        if not (isinstance(call, cst.Call) and _pushes_state_dict(call)):
            return updated_node
        self.hits[PUSH] += 1
        handed_over = hook("hand_over", cst.Name("self"))
        return updated_node.with_changes(value=cst.BooleanOperation(handed_over, cst.Or(), call))


def _pushes_state_dict(call: cst.Call) -> bool:
    is_push = isinstance(call.func, cst.Attribute) and call.func.attr.value == "load_weights"
    return is_push and bool(call.args) and _mentions_state_dict(call.args[0].value)


def _mentions_state_dict(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Attribute) and node.attr.value == "state_dict":
        return True
    return any(_mentions_state_dict(child) for child in node.children)


PATCH = Patch(
    name="adapter_sync",
    summary="the adapter is handed over in memory instead of merging it and pushing all weights",
    hooks=("hand_over",),
    inserter=insertions,
    transformer=GuardedPush,
    requires=("live_adapter", "sleep"),
    after=("engine_reuse",),
    variants=variants(
        {
            "grpo": {">=0.18,<0.28": {SYNC: 1}},
            "rloo": {">=0.22,<0.28": {SYNC: 1}},
            "online_dpo": {">=0.18,<0.23": {PUSH: 1}, ">=0.23": {SYNC: 1}},
            "gold": {">=0.25,<1.0": {SYNC: 1}},
            "vllm_generation": {">=0.28": {SYNC: 1}},
        }
    ),
    exemptions=exemptions(
        {
            "grpo": {">=0.28": _IN_VLLM_GENERATION},
            "rloo": {">=0.28": _IN_VLLM_GENERATION},
            "gold": {">=1.0": _IN_VLLM_GENERATION},
            "openenv": {">=0.26,<1.9": "the helper does not synchronise weights"},
        }
    ),
)
