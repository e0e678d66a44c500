"""Let GRPO of TRL 0.28.0 and 0.29.0 use tools with vLLM in process.

Its tool loop asks `self.llm` for the context length, but the engine has moved to `self.vllm_generation.llm`:
AttributeError. TRL 0.29.1 asks there.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted
from trlpatch.rewrite.patch import Patch, variants

CONTEXT = Anchor("context_length", hint=r"llm_engine\.model_config", prefilter=("self.llm.llm_engine.model_config",))


class ToolEngine(PatchTransformer):
    """Ask the engine where it is."""

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
        if dotted(updated_node) != "self.llm":
            return updated_node
        self.hits[CONTEXT] += 1
        holder = cst.Attribute(value=cst.Name("self"), attr=cst.Name("vllm_generation"))
        return updated_node.with_changes(value=holder)


PATCH = Patch(
    name="tool_engine",
    summary="GRPO 0.28.0 and 0.29.0 use tools with vLLM in process",
    hooks=(),
    transformer=ToolEngine,
    variants=variants({"grpo": {">=0.28,<0.29.1": {CONTEXT: 1}}}),
)
