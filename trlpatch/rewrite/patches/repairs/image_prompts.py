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

ROLLOUT = Anchor("image_rollout", hint=r"\.generate\(", prefilter=(".generate(",))


class ImagePrompts(PatchTransformer):
    """Give the engine one placeholder per image, and compare what it has read with what it was to read."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        found = engine_method(node, "generate")
        if found is None or not node.args:
            return node
        first, *others = node.args
        if first.star or (first.keyword is not None and first.keyword.value != "prompts"):
            return node
        if is_hook(first.value, "image_prompts"):
            return node
        self.hits[ROLLOUT] += 1
        given = first.with_changes(value=hook("image_prompts", found[0], first.value))
        return hook("same_prompts", found[0], node.with_changes(args=[given, *others]))


PATCH = Patch(
    name="image_prompts",
    summary="image prompts reach the engine as they are trained on",
    hooks=("image_prompts", "same_prompts"),
    transformer=ImagePrompts,
    variants=variants({"vllm_generation": {">=0.29.1": {ROLLOUT: 1}}}),
)
