"""Copy an adapter into the engine with torch's own multi-tensor operations: any device, a few kernels per pass."""

from __future__ import annotations

from trlpatch.engine.adapter_sync.staging import Staging, Target
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.change_detection import Sums, content


class ForeachCopy:
    """As FusedCopy, through the staging tensors: sums of the contents first, then the copies."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._content: list[Sums] = []
        self._changes = 0

    def run(self, weights: LoraWeights, targets: list[Target], slot: int) -> int:
        """Copy, and return a number that is another one when the weights' bits are."""
        import torch

        now = content(weights)  # before the copies are made: a later change must not look handed over
        self._staging.write(weights)
        torch._foreach_copy_([target.slot for target in targets], [target.staging for target in targets])
        if now != self._content:
            self._content = now
            self._changes += 1
        return self._changes
