"""Keep AsyncGRPOTrainer from merging an adapter that is sent alone.

From TRL 1.14 on, `_sync_weight_merged` merges the adapter into the base weights, sends them, and unmerges. With an
injected `weight_transfer` there is no other way. In bfloat16 that is not undone exactly: the trainer's base weights
would drift, sync by sync, from those that the engines keep.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from trlpatch.policy.adapter import unwrap

_METHODS = ("merge_adapter", "unmerge_adapter")
_CALLERS = ("_sync_weight", "_sync_weight_merged")


def leave_unmerged(model: Any) -> Callable[[], None]:
    """Make `merge_adapter` and `unmerge_adapter` of this model do nothing when TRL's weight sync calls them.

    Everybody else merges as before. Returns what takes it back.
    """
    model = unwrap(model)
    for name in _METHODS:
        setattr(model, name, _unless_syncing(getattr(model, name)))

    def put_back() -> None:
        for name in _METHODS:
            vars(model).pop(name, None)

    return put_back


def _unless_syncing(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code.co_name in _CALLERS and str(caller.f_globals.get("__name__", "")).startswith("trl."):
            return None
        return original(*args, **kwargs)

    return call
