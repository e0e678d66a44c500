"""`RolloutSample` of this TRL release, built from its own fields."""

from __future__ import annotations

import dataclasses
import inspect
import time
from dataclasses import dataclass
from typing import Any

from trlpatch.errors import AsyncNotSupported

_GIVEN = {
    "prompt", "completion", "input_ids", "completion_mask", "old_log_probs", "advantage", "model_version", "group_id",
    "metrics", "enqueued_at",
}  # fmt: skip
"""What TRL 1.6 to 1.16 have asked for, between them."""
_NEEDED = {"input_ids", "completion_mask", "old_log_probs", "advantage", "model_version", "metrics"}
_DTYPES = {"input_ids": "int64", "completion_mask": "int64", "old_log_probs": "float32"}


@dataclass(frozen=True)
class AsyncRelease:
    """What of `trl.experimental.async_grpo` differs between releases.

    Attributes:
        sample: TRL's `RolloutSample`.
        fields: its fields.
        arrays: those that are NumPy arrays (from TRL 1.16 on; lists before).
        takes_transfer: the trainer has a keyword `weight_transfer` (from TRL 1.9 on).
    """

    sample: type
    fields: frozenset[str]
    arrays: frozenset[str]
    takes_transfer: bool

    @property
    def drains_metrics(self) -> bool:
        """Does the trainer log what is in the worker's `metrics_queue`? From TRL 1.11 on, as `enqueued_at`."""
        return "enqueued_at" in self.fields

    def build(self, **values: Any) -> Any:
        """Build a sample; values that this release has no field for are left out."""
        given = {name: value for name, value in values.items() if name in self.fields}
        if self.arrays:
            import numpy

            for name in self.arrays:
                given[name] = numpy.asarray(given[name], dtype=_DTYPES[name])
        if "enqueued_at" in self.fields:
            given["enqueued_at"] = time.time()
        return self.sample(**given)


def release_of(sample: Any, trainer: Any) -> AsyncRelease:
    """Read the shapes of these two classes of TRL's.

    Raises:
        AsyncNotSupported: they have not those that TRL 1.6 to 1.16 have.
    """
    keywords = inspect.signature(trainer.__init__).parameters
    fields = {field.name: field for field in dataclasses.fields(sample)}
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(_NEEDED - fields.keys()):
        raise _unknown(f"its RolloutSample has no {', '.join(missing)}")
    if unknown := sorted(required - _GIVEN):
        raise _unknown(f"its RolloutSample wants {', '.join(unknown)}")
    if "rollout_worker" not in keywords:
        raise _unknown("its AsyncGRPOTrainer takes no rollout_worker")
    arrays = frozenset(name for name in _DTYPES if "ndarray" in str(fields[name].type))
    return AsyncRelease(sample, frozenset(fields), arrays, "weight_transfer" in keywords)


def installed_release() -> AsyncRelease:
    """Read the shapes of the TRL that can be imported.

    Raises:
        AsyncNotSupported: it has no AsyncGRPOTrainer, or one that cannot be given a worker.
    """
    try:
        import trl.experimental.async_grpo.weight_transfer  # noqa: F401  from TRL 1.6 on; before, the worker sends
        from trl.experimental.async_grpo import AsyncGRPOTrainer
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
    except ImportError as error:
        raise _unknown(str(error)) from error
    return release_of(RolloutSample, AsyncGRPOTrainer)


def _unknown(reason: str) -> AsyncNotSupported:
    return AsyncNotSupported(
        f"AsyncGRPOTrainer on Ray engines needs TRL 1.6 to 1.16, and this one does not fit: {reason}; nothing was set "
        "up. `pip install 'trl>=1.6,<1.17'`, or train with GRPOTrainer on `attach_engine(model, engines)`"
    )
