"""Import the trainers of TRL 1.11 and 1.12 with vLLM 0.28 and newer.

vLLM 0.28.0 (vllm-project/vllm#50902) took `NCCLTrainerSendWeightsArgs` out. The server client of these two releases,
which every trainer imports, takes it from there; only server mode uses it. TRL 1.13 asks for vLLM's version first.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, bound_to_hook, hook, imports, imports_from
from trlpatch.rewrite.patch import Patch, variants

MODULE = "vllm.distributed.weight_transfer.nccl_engine"
NAMES = ("NCCLTrainerSendWeightsArgs", "NCCLWeightTransferEngine")

IMPORT = Anchor(
    "sender_import",
    hint=r"nccl_engine",
    sign=lambda node: imports_from(node, MODULE),
    prefilter=("NCCLTrainerSendWeightsArgs",),
    at_module_level=True,
)


class WeightSender(PatchTransformer):
    """Put what the hook finds in the place of the import."""

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.Assign:
        if not imports(updated_node, MODULE, *NAMES):
            return updated_node
        self.hits[IMPORT] += 1
        return bound_to_hook(hook("weight_sender"), *NAMES)


PATCH = Patch(
    name="weight_sender",
    summary="trainers of TRL 1.11 and 1.12 can be imported with vLLM 0.28 and newer",
    hooks=("weight_sender",),
    transformer=WeightSender,
    after=("without_requests",),
    variants=variants({"vllm_client": {">=1.11,<1.13": {IMPORT: 1}}}),
)
