"""Keep `max_prompt_length` on a vLLM whose `SamplingParams` has no `truncate_prompt_tokens`.

GRPO 0.24-0.25 and RLOO 0.24-0.26 leave the truncation of prompts to that field. vLLM 0.19 and newer take it as an
argument of `generate` and `chat`; without this patch every rollout fails with an unexpected keyword argument.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, engine_method, hook, is_hook, is_key, with_argument
from trlpatch.rewrite.patch import Patch, variants

_FIELD = "truncate_prompt_tokens"

FIELD = Anchor("truncation_field", hint=_FIELD, prefilter=(f'"{_FIELD}":',))
ROLLOUT = Anchor("truncated_rollout", hint=r"\.(generate|chat)\(", prefilter=(".generate(", ".chat("))


class PromptLimit(PatchTransformer):
    """Offer the limit to both places; the hooks give it to the one that this vLLM reads."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target, values = updated_node.targets[0].target, updated_node.value
        # The dictionary for a server is called sampling_params: the server's own vLLM decides.
        if not (isinstance(target, cst.Name) and target.value == "generation_kwargs" and isinstance(values, cst.Dict)):
            return updated_node
        return updated_node.with_changes(value=values.with_changes(elements=[*map(self._element, values.elements)]))

    def _element(self, element: cst.BaseDictElement) -> cst.BaseDictElement:
        if not is_key(element, _FIELD):
            return element
        self.hits[FIELD] += 1
        return cst.StarredDictElement(hook("sampling_limit", element.value), comma=element.comma)

    def edit_call(self, node: cst.Call) -> cst.Call:
        found = engine_method(node, "generate", "chat")
        if found is None or any(is_hook(argument.value, "prompt_limit") for argument in node.args):
            return node
        self.hits[ROLLOUT] += 1
        owner, engine = found
        limit = hook("prompt_limit", engine, cst.Attribute(owner, cst.Name("max_prompt_length")))
        return with_argument(node, cst.Arg(limit, star="**"))


PATCH = Patch(
    name="prompt_limit",
    summary="max_prompt_length holds on a vLLM whose SamplingParams has no truncate_prompt_tokens",
    hooks=("sampling_limit", "prompt_limit"),
    transformer=PromptLimit,
    after=("plain_prompts",),
    variants=variants(
        {
            "grpo": {">=0.24,<0.25": {FIELD: 1, ROLLOUT: 1}, ">=0.25,<0.26": {FIELD: 1, ROLLOUT: 2}},
            "rloo": {">=0.24,<0.25": {FIELD: 1, ROLLOUT: 1}, ">=0.25,<0.27": {FIELD: 1, ROLLOUT: 2}},
        }
    ),
)
