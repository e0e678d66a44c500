"""How long the trainer's process waits for the engines' actors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Seconds; each is an option of `create_engines`."""

    init: float = 1200.0
    """Until every engine is up."""
    health: float = 600.0
    """An engine that answers no health check, or ends no step while requests run, for so long is lost."""
    sync: float = 120.0
    """Until every engine has taken an adapter or weights."""
    rollout: float | None = None
    """Until one call of `generate` is answered; None: as long as the engines are healthy."""
