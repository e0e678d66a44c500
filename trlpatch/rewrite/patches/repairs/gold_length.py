"""Roll out with GOLD 0.25 on vLLM.

It reads `max_completion_length` off a `GenerationConfig`, which has no such field: AttributeError. TRL 0.26 reads
`max_new_tokens`, which GOLD sets from its own `max_completion_length`.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted
from trlpatch.rewrite.patch import Patch, variants

_READ = "generation_config.max_completion_length"

LENGTH = Anchor("completion_length", hint=r"max_completion_length", prefilter=(_READ,))


class GoldLength(PatchTransformer):
    """Read the field that the config has."""

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
        if dotted(updated_node) != _READ:
            return updated_node
        self.hits[LENGTH] += 1
        return updated_node.with_changes(attr=cst.Name("max_new_tokens"))


PATCH = Patch(
    name="gold_length",
    summary="GOLD 0.25 rolls out on vLLM",
    hooks=(),
    transformer=GoldLength,
    after=("guided_decoding",),
    variants=variants({"gold": {">=0.25,<0.26": {LENGTH: 1}}}),
)
