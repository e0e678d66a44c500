"""Roll out RLOO on prompts that are text, not messages.

RLOO 0.25.0-0.26.2 prepares every prompt as a list of messages and fails with `string indices must be integers` on
text. Fixed in 0.27.0.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, hook
from trlpatch.rewrite.patch import Patch, variants

_PREPARE = "prepare_multimodal_messages_vllm"

PREPARE = Anchor("prepare_messages", hint=r"prepare_\w*messages", prefilter=(f"[{_PREPARE}(",))


class PlainPrompts(PatchTransformer):
    """Put the hook in the place of the function that prepares messages."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        if not (isinstance(node.func, cst.Name) and node.func.value == _PREPARE):
            return node
        self.hits[PREPARE] += 1
        return node.with_changes(func=hook("messages_only", node.func))


PATCH = Patch(
    name="plain_prompts",
    summary="RLOO 0.25 and 0.26 roll out on plain-text prompts",
    hooks=("messages_only",),
    transformer=PlainPrompts,
    after=("warnings_issued",),
    variants=variants({"rloo": {">=0.25,<0.27": {PREPARE: 1}}}),
)
