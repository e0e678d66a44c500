"""Sync the adapter alone where TRL merges it and pushes every weight (`sync_weights`).

The definition of the sync method is edited, not its callers: TRL 1.16 has eleven. The early return stands after a
leading wake, because from TRL 1.10 on the only `wake_up(tags=["weights"])` is inside `sync_weights`. Where the hook
declines (server mode, full fine-tuning, an adapter that vLLM cannot express), TRL's own body runs unchanged.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import Insertion, PatchTransformer, after, before, hook, is_hook_call
from trlpatch.rewrite.outline import Function, Outline
from trlpatch.rewrite.patch import Patch, exemptions, variants
from trlpatch.trl_names import SYNC_METHODS

SYNC = Anchor(
    "sync_method",
    hint=r"def \w*(sync|vllm)\w*\(",
    strict=rf"def ({'|'.join(SYNC_METHODS)})\(",
)
PUSH = Anchor(
    "state_dict_push",
    hint=r"\.load_weights\(",
    strict=r"\.load_weights\(.*\.state_dict\(\)",
    prefilter=(".load_weights(",),
)

_IN_VLLM_GENERATION = "weights are synchronised in VLLMGeneration"


def insertions(file: Outline, expected: Collection[Anchor]) -> Iterator[Insertion]:
    """Return early from the sync method, after a leading wake."""
    for function in file.functions:
        handed_over = any(isinstance(s, ast.If) and is_hook_call(s.test, "hand_over") for s in function.body)
        if function.name in SYNC_METHODS and not handed_over:
            yield _early_return(file, function)


def _early_return(file: Outline, function: Function) -> Insertion:
    statements = "if _trlpatch.hand_over(self):\n    return"
    wakes = [s for s in function.body if isinstance(s, ast.If) and ".wake_up(" in ast.unparse(s)]
    wakes += [s for s in function.body if isinstance(s, ast.If) and "_trlpatch.wake_up(" in ast.unparse(s)]
    if wakes:
        return after(file, function, wakes[-1], SYNC, statements)
    return before(file, function, function.body[0], SYNC, statements)


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
