"""Let GRPO load a model by its id without gradient checkpointing.

Up to 0.19 TRL sends `use_cache=None` along where `model_init_kwargs` has none, and configs of transformers 5 take a
bool only. TRL 0.20 sends nothing.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook, is_text
from trlpatch.rewrite.patch import Patch, variants

_NAME = "use_cache"
_OPTIONS = "model_init_kwargs"

LOOKUP = Anchor(_NAME, hint=rf"{_OPTIONS}\.\w+\(.*{_NAME}", prefilter=(f'{_OPTIONS}.get("{_NAME}")',))


class UseCache(PatchTransformer):
    """Ask the hook for the value."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        if dotted(node.func) != f"{_OPTIONS}.get" or len(node.args) != 1 or not is_text(node.args[0].value, _NAME):
            return node
        self.hits[LOOKUP] += 1
        return hook(_NAME, cst.Name(_OPTIONS))


PATCH = Patch(
    name=_NAME,
    summary="GRPO loads a model by its id with transformers 5, also without gradient checkpointing",
    hooks=(_NAME,),
    transformer=UseCache,
    after=("warnings_issued",),
    variants=variants({"grpo": {">=0.18,<0.20": {LOOKUP: 1}}}),
)
