"""Train and log OnlineDPO with the trainer of transformers 5, which has lost two of its parts.

`use_apex`, read up to TRL 0.23 (removed in transformers 5.0), and `_nested_gather`, called up to TRL 0.27 (removed in
5.2). TRL 0.28 asks for the version.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook
from trlpatch.rewrite.patch import Patch, variants

APEX = Anchor("use_apex", hint="apex", prefilter=("self.use_apex",))
GATHER = Anchor("nested_gather", hint="nested_gather", prefilter=("self._nested_gather(",))

_PARTS = {"self.use_apex": (APEX, "use_apex"), "self._nested_gather": (GATHER, "nested_gather")}


class TrainerParts(PatchTransformer):
    """Ask the hook for either."""

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute | cst.Call:
        anchor, name = _PARTS.get(dotted(updated_node) or "", (None, ""))
        if anchor is None:
            return updated_node
        self.hits[anchor] += 1
        return hook(name, updated_node.value)


PATCH = Patch(
    name="trainer_parts",
    summary="OnlineDPO trains and logs with transformers 5",
    hooks=("nested_gather", "use_apex"),
    transformer=TrainerParts,
    after=("seed_worker",),
    variants=variants({"online_dpo": {">=0.18,<0.24": {APEX: 1, GATHER: 1}, ">=0.24,<0.28": {GATHER: 1}}}),
)
