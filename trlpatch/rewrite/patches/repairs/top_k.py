"""Hand `top_k` to vLLM as it wants it: -1 for "no limit".

Up to 0.26 TRL translated None; since then the value of the config goes to `SamplingParams` as it is, and None, which
the config allows, fails there. Older vLLM refuses 0 too (trl #4695).
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, hook, is_hook, is_key
from trlpatch.rewrite.patch import Patch, variants

TOP_K = Anchor("top_k", hint=r"top_k", prefilter=('"top_k":', "'top_k':"))


class TopK(PatchTransformer):
    """Send the value through the hook in the dictionaries that become `SamplingParams`."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target, values = updated_node.targets[0].target, updated_node.value
        # The one for a server is called sampling_params, the one for transformers has max_new_tokens.
        if not (isinstance(target, cst.Name) and target.value in ("generation_kwargs", "generation_params")):
            return updated_node
        if not isinstance(values, cst.Dict) or not any(is_key(element, "max_tokens") for element in values.elements):
            return updated_node
        return updated_node.with_changes(value=values.with_changes(elements=[*map(self._element, values.elements)]))

    def _element(self, element: cst.BaseDictElement) -> cst.BaseDictElement:
        if not is_key(element, "top_k") or is_hook(element.value, "top_k"):
            return element
        self.hits[TOP_K] += 1
        return element.with_changes(value=hook("top_k", element.value))


_ONCE = {TOP_K: 1}

PATCH = Patch(
    name="top_k",
    summary="top_k=None and top_k=0 mean no limit on every vLLM",
    hooks=("top_k",),
    transformer=TopK,
    after=("trainer_parts",),
    variants=variants(
        {
            "grpo": {">=0.27,<0.28": _ONCE},
            "rloo": {">=0.27,<0.28": _ONCE},
            "online_dpo": {">=0.27": _ONCE},
            "vllm_generation": {">=0.28": _ONCE},
        }
    ),
)
