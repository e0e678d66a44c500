"""Let the engine read the image placeholders of a prompt that the trainer trains on.

TRL 0.29.1 and newer render prompts with the processor, which puts an image's many tokens in place of its placeholder,
and hand these ids to `llm.generate` together with the image: vLLM expands the first of the tokens once more, and
samples from a prompt that nobody trains on (https://github.com/huggingface/trl/issues/6294).
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, engine_method, hook, is_hook
from trlpatch.rewrite.patch import Patch, variants

_PROMPTS, _OUTPUTS = "vllm_prompts", "all_outputs"

ROLLOUT = Anchor("image_rollout", hint=r"\.generate\(", prefilter=(f".generate({_PROMPTS}",))
READ = Anchor("prompts_read", hint=r"prompt_token_ids", prefilter=(f".prompt_token_ids for output in {_OUTPUTS}",))


class ImagePrompts(PatchTransformer):
    """Give the engine one placeholder per image, and compare what it has read with what the trainer has."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        found = engine_method(node, "generate")
        if found is None or not node.args or not _named(node.args[0].value, _PROMPTS):
            return node
        self.hits[ROLLOUT] += 1
        first, *others = node.args
        given = hook("image_prompts", found[0], first.value)
        return node.with_changes(args=[first.with_changes(value=given), *others])

    def leave_CompFor(self, original_node: cst.CompFor, updated_node: cst.CompFor) -> cst.CompFor:
        if not _named(updated_node.iter, _OUTPUTS) or is_hook(updated_node.iter, "same_prompts"):
            return updated_node
        self.hits[READ] += 1
        outputs = hook("same_prompts", cst.Name("self"), cst.Name(_PROMPTS), updated_node.iter)
        return updated_node.with_changes(iter=outputs)


def _named(node: cst.BaseExpression, name: str) -> bool:
    return isinstance(node, cst.Name) and node.value == name


PATCH = Patch(
    name="image_prompts",
    summary="image prompts reach the engine as they are trained on",
    hooks=("image_prompts", "same_prompts"),
    transformer=ImagePrompts,
    variants=variants({"vllm_generation": {">=0.29.1": {ROLLOUT: 1, READ: 1}}}),
)
