"""Weight-transfer backend for vLLM 0.26 and newer: the tensors are in the update. Imported by vLLM, in its workers.

No network of its own: an actor gets the tensors from Ray's object store, and vLLM's session does the rest. Registered
under `shapes.BACKEND`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from trlpatch.ray.transfer import loading, shapes

shapes.register()


class Registers:
    """A `worker_extension_cls` whose import is all that it does: the backend is known before a worker is built."""


@dataclass
class NoInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing is agreed on before."""


@dataclass
class Tensors(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Some of the weights."""

    weights: loading.Weights


class TensorTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """Loads what an update brings."""

    init_info_cls, update_info_cls = NoInit, Tensors

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        """Begin a layerwise reload."""
        loading.begin(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load; vLLM's own method waits for an accelerator afterwards, also where there is none."""
        import torch

        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Tensors) -> None:
        """Load."""
        loading.load(self.model, update_info.weights)

    def finish_weight_update(self) -> None:
        """End the layerwise reload."""
        loading.finish(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is open."""
