"""Timeouts of rollout engines on Ray actors: named, in seconds, each an argument and an environment variable."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial

from trlpatch.errors import InvalidOption
from trlpatch.options import SECONDS, read_seconds

DEFAULTS = {"cluster": 300.0, "init": 1200.0, "health": 600.0, "sync": 120.0, "rollout": math.inf, "abort": 60.0}
"""The seconds of each timeout where nobody says another value."""

VARIABLES = {name: f"TRLPATCH_RAY_{name.upper()}_TIMEOUT" for name in DEFAULTS}
"""The environment variable of each timeout."""


def _unless_given(name: str) -> float:
    value = read_seconds(VARIABLES[name])
    return DEFAULTS[name] if value is None else value


@dataclass(frozen=True)
class Timeouts:
    """How long the trainer's process waits for the engines' actors, in seconds; infinity waits for ever.

    What is not given is what its environment variable (`TRLPATCH_RAY_INIT_TIMEOUT`, ...) says, else the default.

    Raises:
        InvalidOption: a value is no positive number, or an environment variable says none.
    """

    cluster: float = field(default_factory=partial(_unless_given, "cluster"))
    """For Ray itself to answer: joining or starting a cluster, what is free on it, its end. 300."""
    init: float = field(default_factory=partial(_unless_given, "init"))
    """From the creation of an actor until its engine is up: placement, loading, compilation. 1200."""
    health: float = field(default_factory=partial(_unless_given, "health"))
    """How long an engine with requests may go without ending a step, and an actor without answering. 600."""
    sync: float = field(default_factory=partial(_unless_given, "sync"))
    """For an adapter or weights to be taken over by every engine. 120."""
    rollout: float = field(default_factory=partial(_unless_given, "rollout"))
    """From asking an engine until its prompts are answered. Infinity: one that steps is slow, which is no fault."""
    abort: float = field(default_factory=partial(_unless_given, "abort"))
    """For the requests of an interrupted rollout to be dropped; an engine that takes longer is replaced. 60."""

    def __post_init__(self) -> None:
        for one in fields(self):
            given: object = getattr(self, one.name)
            if isinstance(given, bool) or not isinstance(given, int | float) or math.isnan(given) or given <= 0:
                raise InvalidOption(
                    f"Timeouts({one.name}={given!r}): expected a positive number of seconds, or math.inf: "
                    f"{SECONDS[VARIABLES[one.name]]}. Leave it out for {DEFAULTS[one.name]:g}."
                )

    def __getitem__(self, name: str) -> float:
        """Return a timeout by its name."""
        value: float = getattr(self, name)
        return value

    def how_to_raise(self, name: str) -> str:
        """Say how a timeout is made longer: the end of every message about one."""
        return f"Raise it with timeouts=Timeouts({name}={2 * self[name]:g}) or {VARIABLES[name]}={2 * self[name]:g}"
