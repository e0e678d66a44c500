"""The methods of an engine's actor by which weights reach it.

The first six are those that `RayVLLMWeightSyncClient` (vLLM 0.26+) calls by `.remote`, with its own requests.
"""

from __future__ import annotations

from typing import Any

from trlpatch.ray.transfer.shapes import Route
from trlpatch.ray.transfer.updates import WeightUpdates

WEIGHT_METHODS = (
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
    "update_weight_version", "get_weight_version", "shutdown_weight_transfer_engine", "abandon_weight_update",
    "weight_route", "weight_refusal", "weight_ranks",
)  # fmt: skip
"""They wait for the stepping thread, some for the trainer: none may stand in the way of a health check."""


class WeightTransferMethods:
    """To be mixed into the actor's class, which makes `weights`."""

    weights: WeightUpdates

    def init_weight_transfer_engine(self, request: Any) -> None:
        """Join the trainer's transfer group; `request` is vLLM's WeightTransferInitRequest, or a dictionary."""
        self.weights.connect(_info(request, "init_info"))

    def start_weight_update(self) -> None:
        """See WeightUpdates.begin."""
        self.weights.begin()

    def update_weights(self, request: Any) -> None:
        """See WeightUpdates.update; `weights` may be a reference into Ray's object store."""
        info = _info(request, "update_info")
        if "weights" in info:
            info = {**info, "weights": _fetched(info["weights"])}
        self.weights.update(info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See WeightUpdates.finish."""
        self.weights.finish(weight_version)

    def update_weight_version(self, new_version: str) -> None:
        """See WeightUpdates.name."""
        self.weights.name(new_version)

    def get_weight_version(self) -> str:
        """See WeightUpdates.version."""
        return self.weights.version()

    def shutdown_weight_transfer_engine(self) -> None:
        """Leave the trainer's group; another one can be joined."""
        self.weights.disconnect()

    def abandon_weight_update(self) -> None:
        """See WeightUpdates.abandon."""
        self.weights.abandon()

    def weight_route(self) -> Route:
        """See WeightUpdates.route."""
        return self.weights.route()

    def weight_refusal(self) -> Exception | None:
        """What `start_weight_update` would raise now with nothing changed."""
        return self.weights.refusal()

    def weight_ranks(self) -> int:
        """How many workers there are, each a rank of the trainer's transfer group."""
        return self.weights.ranks()


def _info(request: Any, name: str) -> dict[str, Any]:
    info = request.get(name) if isinstance(request, dict) else getattr(request, name, None)
    if not isinstance(info, dict):
        raise ValueError(f"a weight-transfer request has {name!r} as a dictionary, not {info!r}")
    return info


def _fetched(weights: Any) -> Any:
    """A reference inside a dictionary is not resolved by Ray, and must not be: calls would overtake each other."""
    if isinstance(weights, list):
        return weights
    import ray

    return ray.get(weights)
