"""Let `vllm_sampling_params` of the config decide over TRL's sampling parameters.

TRL builds `SamplingParams` from inline keywords (GRPO 0.18, OnlineDPO below 0.23, GOLD) or from a dict, in the trainer
or in VLLMGeneration, which has no `args`: the hook stands in for the class and merges what the user gave explicitly,
so one edit fits every form. `VLLMGeneration(...)` is told the trainer's arguments when it is built.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, calls, hook
from trlpatch.rewrite.patch import Patch, variants

PARAMS = Anchor(
    "sampling_params",
    hint=r"SamplingParams",
    sign=lambda node: calls(node, "SamplingParams"),
    prefilter=("SamplingParams(",),
)
GENERATION = Anchor(
    "vllm_generation",
    hint=r"VLLMGeneration",
    sign=lambda node: calls(node, "VLLMGeneration"),
    prefilter=("VLLMGeneration(",),
)


class Sampling(PatchTransformer):
    """Put the hooks in the place of the classes that TRL calls."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        if not isinstance(node.func, cst.Name):
            return node
        owner = self._owner()
        if node.func.value == "SamplingParams" and owner is not None:
            self.hits[PARAMS] += 1
            return node.with_changes(func=hook("sampling_params", owner, node.func))
        if node.func.value == "VLLMGeneration":
            self.hits[GENERATION] += 1
            return node.with_changes(func=hook("generation", cst.Name("args"), node.func))
        return node

    def _owner(self) -> cst.Name | None:
        # In __init__ the trainer has no `self.args` yet; the helper functions of openenv take the trainer first.
        name = next((name for name in ("args", "self", "trainer") if name in self.region.parameters), None)
        return None if name is None else cst.Name(name)


PATCH = Patch(
    name="sampling",
    summary="sampling parameters given explicitly in the config win over TRL's",
    hooks=("sampling_params", "generation"),
    transformer=Sampling,
    requires=("sampling_config",),
    after=("sleep",),
    variants=variants(
        {
            "grpo": {">=0.18,<0.28": {PARAMS: 1}, ">=0.28": {GENERATION: 1}},
            "rloo": {">=0.22,<0.28": {PARAMS: 1}, ">=0.28": {GENERATION: 1}},
            "online_dpo": {">=0.18": {PARAMS: 1}},
            "gold": {">=0.25,<1.0": {PARAMS: 1}, ">=1.0": {GENERATION: 1}},
            "openenv": {">=0.26,<1.9": {PARAMS: 1}},
            "vllm_generation": {">=0.28": {PARAMS: 1}},
            "distillation": {">=1.1": {GENERATION: 1}},
            "self_distillation": {">=1.0,<1.6": {GENERATION: 1}},
            "sdpo": {">=1.6": {GENERATION: 1}},
            "sdft": {">=1.6": {GENERATION: 1}},
            "ssd": {">=1.2,<1.16": {GENERATION: 1}},
            "iw_opd": {">=1.9": {GENERATION: 1}},
        }
    ),
)
