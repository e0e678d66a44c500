"""Rollout engines on Ray actors, on GPUs of their own.

    engines = trlpatch.ray.create_engines("Qwen/Qwen2.5-7B-Instruct", num_engines=2)
    trlpatch.attach_engine(model, engines)

Nothing here is imported unless it is asked for, and Ray itself only when engines are created.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trlpatch.ray.create import create_engines, shutdown
    from trlpatch.ray.engines import RayEngines
    from trlpatch.ray.timeouts import Timeouts

__all__ = ["RayEngines", "Timeouts", "create_engines", "shutdown"]

_PLACES = {
    "RayEngines": "trlpatch.ray.engines",
    "Timeouts": "trlpatch.ray.timeouts",
    "create_engines": "trlpatch.ray.create",
    "shutdown": "trlpatch.ray.create",
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(place), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
