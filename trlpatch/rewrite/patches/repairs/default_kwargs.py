"""Roll out with GRPO 0.19.0 without setting `generation_kwargs`.

`generation_kwargs.update(self.args.generation_kwargs)` raises TypeError for the default, None. Fixed in 0.19.1.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook
from trlpatch.rewrite.patch import Patch, variants

_GIVEN = "self.args.generation_kwargs"

UPDATE = Anchor("kwargs_update", hint=r"generation_kwargs", prefilter=(f".update({_GIVEN})",))


class DefaultKwargs(PatchTransformer):
    """Send the argument through the hook."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        is_update = isinstance(node.func, cst.Attribute) and node.func.attr.value == "update"
        if not is_update or len(node.args) != 1 or dotted(node.args[0].value) != _GIVEN:
            return node
        self.hits[UPDATE] += 1
        given = node.args[0].with_changes(value=hook("given", node.args[0].value))
        return node.with_changes(args=[given])


PATCH = Patch(
    name="default_kwargs",
    summary="GRPO 0.19.0 rolls out without generation_kwargs in its config",
    hooks=("given",),
    transformer=DefaultKwargs,
    after=("use_cache",),
    variants=variants({"grpo": {">=0.19,<0.19.1": {UPDATE: 1}}}),
)
