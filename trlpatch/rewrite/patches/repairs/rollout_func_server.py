"""Refuse a `rollout_func` that TRL 0.25 would never call.

TRL 0.25 calls it in server mode only, and generates without it in process, where an attached engine puts the trainer.
TRL 0.26 calls it in both modes.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, hook, is_hook
from trlpatch.rewrite.patch import Patch, variants
from trlpatch.rewrite.patches.rollout.rollout_func import stores_rollout_func

STORED = Anchor("rollout_func_stored", hint=r"rollout_func", prefilter=("self.rollout_func = rollout_func",))


class RolloutFuncServer(PatchTransformer):
    """Put the hook around the function where the trainer keeps it."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        value = updated_node.value
        if not stores_rollout_func(updated_node) or is_hook(value, "rollout_func_server"):
            return updated_node
        self.hits[STORED] += 1
        names = [cst.Name(name) for name in ("self", "model", "args")]
        return updated_node.with_changes(value=hook("rollout_func_server", *names, value))


PATCH = Patch(
    name="rollout_func_server",
    summary="GRPO 0.25 refuses a rollout_func that it would not call",
    hooks=("rollout_func_server",),
    transformer=RolloutFuncServer,
    after=("prompt_limit",),
    variants=variants({"grpo": {">=0.25,<0.26": {STORED: 1}}}),
)
