"""What a user may ask of `PatchFastRL`, and what the last call asked for.

The active options live here and not with the hooks, so that a warm start imports no hook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trlpatch.errors import InvalidOption

Colocate = Literal["auto", "always", "never"]
Sleep = Literal["auto", "on", "off", "kv"]
Adapter = Literal["auto", "request", "off"]
OnDrift = Literal["raise", "stock"]
OldLogps = Literal["stock", "reuse"]

_ALLOWED: dict[str, tuple[str, ...]] = {
    "colocate": get_args(Colocate),
    "sleep": get_args(Sleep),
    "adapter": get_args(Adapter),
    "on_drift": get_args(OnDrift),
    "old_logps": get_args(OldLogps),
}


@dataclass(frozen=True)
class Options:
    """The checked arguments of one `PatchFastRL` call.

    Only `skip` and `old_logps` change the patched text. `colocate`, `sleep` and `adapter` are read by the hooks while
    training.

    Attributes:
        algorithm: a trainer's short name such as "grpo", or None for every trainer that can use vLLM.
        colocate: "auto" uses the engine a model carries, "always" also colocates the engine that TRL builds, "never"
            leaves TRL's own choice.
        sleep: "auto" follows how the engine was built, "on" demands an engine that can sleep, "off" keeps it awake,
            "kv" is "on" and gives back the KV cache alone. Otherwise weights that the trainer does not share make
            way too, until training was measured to leave room for them.
        adapter: "auto" hands the adapter over whenever the engine can express it, "request" makes that an error
            otherwise, "off" keeps TRL's own weight sync.
        on_drift: what happens when a patch does not fit this TRL: an error, or that part of TRL stays stock.
        skip: names of patches to leave out, kept sorted and without repeats.
        old_logps: "reuse" takes the training forward's log-probabilities for the old ones where no update lies
            between them, "stock" computes them in a pass of their own as TRL does.

    Raises:
        InvalidOption: a value is outside its list or has the wrong type.
    """

    algorithm: str | None = None
    colocate: Colocate = "auto"
    sleep: Sleep = "auto"
    adapter: Adapter = "auto"
    on_drift: OnDrift = "raise"
    skip: tuple[str, ...] = ()
    old_logps: OldLogps = "stock"

    def __post_init__(self) -> None:
        algorithm: object = self.algorithm
        if algorithm is not None and not isinstance(algorithm, str):
            raise InvalidOption(
                f"algorithm={self.algorithm!r}: expected a trainer's short name such as 'grpo', or None for all of "
                f"them, found {type(self.algorithm).__name__}. See: trlpatch list"
            )
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidOption(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")
        skip: object = self.skip
        if not isinstance(skip, tuple | list) or not all(isinstance(name, str) for name in skip):
            raise InvalidOption(
                f"skip={self.skip!r}: expected a tuple or list of patch names such as ('sleep',). See: trlpatch list"
            )
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))

    @property
    def asked_for(self) -> tuple[str, ...]:
        """Names of the optional patches that these options ask for."""
        return ("old_logps",) if self.old_logps == "reuse" else ()


_active: Options | None = None


def activate(options: Options | None) -> None:
    """Make `options` the ones that the hooks follow while training; None means the defaults."""
    global _active
    _active = options


def active() -> Options:
    """Return the active options, or the defaults where nothing was patched through PatchFastRL."""
    return _active if _active is not None else Options()
