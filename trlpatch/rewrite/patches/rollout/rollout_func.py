"""Give rollouts that a user's `rollout_func` makes on the trainer's engine the adapter being trained.

TRL hands the engine to the function (through the trainer) after merging the adapter into its weights, so a plain
`trainer.llm.generate(prompts)` in it is the policy. With the adapter in a request instead, the same call would come
from the base model without an error. In process since TRL 0.26; where TRL stores the function every later caller of
it is reached, in subclasses with a `_generate` of their own (DPPO, 1.0-1.8) too.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook, is_hook
from trlpatch.rewrite.patch import Patch, exemptions, variants

STORED = Anchor(
    "rollout_func_stored",
    hint=r"rollout_func",
    prefilter=("self.rollout_func = rollout_func",),
)


class RolloutFunc(PatchTransformer):
    """Put the hook around the function where the trainer keeps it."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        value = updated_node.value
        if not stores_rollout_func(updated_node) or is_hook(value, "rollout_func"):
            return updated_node
        self.hits[STORED] += 1
        return updated_node.with_changes(value=hook("rollout_func", cst.Name("self"), value))


def stores_rollout_func(node: cst.Assign) -> bool:
    """Tell whether `node` is an assignment to `self.rollout_func` alone."""
    return len(node.targets) == 1 and dotted(node.targets[0].target) == "self.rollout_func"


PATCH = Patch(
    name="rollout_func",
    summary="rollouts that rollout_func makes on the trainer's engine carry the adapter being trained",
    hooks=("rollout_func",),
    transformer=RolloutFunc,
    requires=("live_adapter",),
    after=("live_adapter",),
    variants=variants({"grpo": {">=0.26": {STORED: 1}}}),
    exemptions=exemptions(
        {"grpo": {">=0.18,<0.25": "no rollout_func", ">=0.25,<0.26": "rollout_func runs in server mode only"}}
    ),
)
