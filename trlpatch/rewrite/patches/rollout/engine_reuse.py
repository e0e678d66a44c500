"""Use the engine that the model carries instead of building a second one.

TRL's `LLM(...)` keeps its own arguments: the hook stands in for the class, yields the attached engine, or calls the
class with what a live LoRA adapter needs besides. The statements around it (rank environment, tensor-parallel groups,
barriers) stay.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, calls, hook
from trlpatch.rewrite.patch import Patch, exemptions, variants

CONSTRUCTOR = Anchor(
    "engine_constructor",
    hint=r"LLM\w*\(",
    sign=lambda node: calls(node, "LLM"),
    prefilter=("LLM(",),
)

_IN_VLLM_GENERATION = "the engine is built in VLLMGeneration"


class EngineReuse(PatchTransformer):
    """Put the hook in the place of the class that TRL calls."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        if not (isinstance(node.func, cst.Name) and node.func.value == "LLM"):
            return node
        self.hits[CONSTRUCTOR] += 1
        return node.with_changes(func=hook("engine", cst.Name("self"), cst.Name("model"), node.func))


PATCH = Patch(
    name="engine_reuse",
    summary="the engine attached to the model is used; TRL builds one only if there is none, ready for LoRA",
    hooks=("engine",),
    transformer=EngineReuse,
    after=("configure",),
    variants=variants(
        {
            "grpo": {">=0.18,<0.28": {CONSTRUCTOR: 1}},
            "rloo": {">=0.22,<0.28": {CONSTRUCTOR: 1}},
            "online_dpo": {">=0.18": {CONSTRUCTOR: 1}},
            "gold": {">=0.25,<1.0": {CONSTRUCTOR: 1}},
            "vllm_generation": {">=0.28": {CONSTRUCTOR: 1}},
        }
    ),
    exemptions=exemptions(
        {
            "grpo": {">=0.28": _IN_VLLM_GENERATION},
            "rloo": {">=0.28": _IN_VLLM_GENERATION},
            "gold": {">=1.0": _IN_VLLM_GENERATION},
        }
    ),
)
