"""Copy an adapter into the engine with torch's own multi-tensor operations: any device, a few kernels per pass."""

from __future__ import annotations

from dataclasses import dataclass

from trlpatch.engine.adapter_sync.staging import Staging, Target
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.change_detection import Sums, content


@dataclass(frozen=True)
class Queued:
    """A copy that needs no waiting for: comparing the contents did wait. See `Pending`."""

    changes: int

    def wait(self) -> int:
        """Nothing to wait for."""
        return self.changes

    def base_glance(self, spots: object) -> None:
        """The base weights were not read."""
        return


class ForeachCopy:
    """As FusedCopy, through the staging tensors: sums of the contents first, then the copies."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._content: list[Sums] = []
        self._changes = 0

    def start(self, weights: LoraWeights, targets: list[Target], slot: int) -> Queued:
        """Copy; the answer is another number when the weights' bits are."""
        import torch

        with torch.inference_mode():  # buffers may be inference tensors; trained ones are only read
            now = content(weights)  # before the copies are made: a later change must not look handed over
            self._staging.write(weights)
            torch._foreach_copy_([target.slot for target in targets], [target.staging for target in targets])
        if now != self._content:
            self._content = now
            self._changes += 1
        return Queued(self._changes)
