"""Give `seed_worker` the arguments that transformers 4.52 asks for.

Without them a dataloader with workers fails: GRPO 0.18.0 and 0.18.1 (fixed in 0.18.2), OnlineDPO up to 0.29.1.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, hook, is_text
from trlpatch.rewrite.patch import Patch, variants

WORKER = Anchor("worker_init", hint=r"seed_worker", prefilter=('["worker_init_fn"] = seed_worker',))


class SeedWorker(PatchTransformer):
    """Hand the function and the trainer's arguments to the hook."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        value = updated_node.value
        if not isinstance(value, cst.Name) or value.value != "seed_worker" or not _initialises(updated_node):
            return updated_node
        self.hits[WORKER] += 1
        return updated_node.with_changes(value=hook("seed_worker", cst.Name("self"), value))


def _initialises(node: cst.Assign) -> bool:
    target = node.targets[0].target
    index = target.slice[0].slice if isinstance(target, cst.Subscript) else None
    return isinstance(index, cst.Index) and is_text(index.value, "worker_init_fn")


_ONCE = {WORKER: 1}

PATCH = Patch(
    name="seed_worker",
    summary="dataloader workers are seeded with transformers 4.52 and newer",
    hooks=("seed_worker",),
    transformer=SeedWorker,
    after=("use_cache",),
    variants=variants({"grpo": {">=0.18,<0.18.2": _ONCE}, "online_dpo": {">=0.18,<1.0": _ONCE}}),
)
