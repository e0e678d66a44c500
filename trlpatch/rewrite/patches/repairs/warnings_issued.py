"""Build trainers from models that have no `warnings_issued`.

transformers 5.1 dropped the attribute; GRPO, RLOO and OnlineDPO up to TRL 0.27.1 write to it while they are built.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook
from trlpatch.rewrite.patch import Patch, variants

_NAME = "warnings_issued"

WRITE = Anchor("warnings_issued", hint=_NAME, prefilter=(f"model.{_NAME}[",))


class WarningsIssued(PatchTransformer):
    """Ask the hook for the dictionary."""

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute | cst.Call:
        if dotted(updated_node) != f"model.{_NAME}":
            return updated_node
        self.hits[WRITE] += 1
        return hook(_NAME, updated_node.value)


_ONCE = {WRITE: 1}

PATCH = Patch(
    name="warnings_issued",
    summary="trainers can be built from models of transformers 5.1 and newer",
    hooks=("warnings_issued",),
    transformer=WarningsIssued,
    after=("guided_decoding",),
    variants=variants(
        {
            "grpo": {">=0.18,<0.27.2": _ONCE},
            "rloo": {">=0.22,<0.27.2": _ONCE},
            "online_dpo": {">=0.18,<0.27.2": _ONCE},
        }
    ),
)
