"""Options: the arguments of `PatchFastRL`, which of them are in force, and the environment variables.

The active options live here and not with the hooks, so that a warm start imports no hook.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
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
    """The checked arguments of one `PatchFastRL` call, whose documentation says what each means.

    Only `skip` and `old_logps` change the patched text; `skip` is kept sorted and without repeats. `colocate`, `sleep`
    and `adapter` are read by the hooks while training.

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
        named = isinstance(skip, tuple | list | set | frozenset)
        if not named or not all(isinstance(name, str) for name in self.skip):
            raise InvalidOption(
                f"skip={self.skip!r}: expected a tuple, list or set of patch names such as ('sleep',), and () for "
                f"none, found {type(skip).__name__}{' with other things than names' if named else ''}. "
                "See: trlpatch list"
            )
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))

    @property
    def asked_for(self) -> tuple[str, ...]:
        """Names of the optional patches that these options ask for."""
        return ("old_logps",) if self.old_logps == "reuse" else ()


DISABLE = "TRLPATCH_DISABLE"
SLEEP = "TRLPATCH_SLEEP"
SLEEP_ALIAS = "UNSLOTH_VLLM_STANDBY"
VLLM_ON_GB10 = "TRLPATCH_VLLM_ON_GB10"
CACHE_DIR = "TRLPATCH_CACHE_DIR"
DUMP = "TRLPATCH_DUMP"

SWITCHES = {
    DISABLE: "whether PatchFastRL() does nothing and TRL stays stock",
    SLEEP: "whether an engine is built with sleep mode where enable_sleep_mode is not given",
    SLEEP_ALIAS: f"what {SLEEP} says, in Unsloth's words; {SLEEP} wins",
    VLLM_ON_GB10: "whether vLLM is used on DGX Spark (GB10)",
}
"""The environment variables that are on or off, and what each decides."""

DIRECTORIES = {
    CACHE_DIR: "where patched files are kept, instead of the user's cache directory",
    DUMP: "where PatchFastRL() also writes the files that run",
}
"""The environment variables that name a directory."""

# The words of click's BOOL. Importing click would cost a warm start 20 ms.
_ON = frozenset({"1", "true", "t", "yes", "y", "on"})
_OFF = frozenset({"0", "false", "f", "no", "n", "off"})


def read_switch(name: str) -> bool | None:
    """Return what an environment variable of `SWITCHES` says; None where it is not set, or set to nothing.

    Case and surrounding blanks do not count.

    Raises:
        InvalidOption: it says neither yes nor no.
    """
    value = os.environ.get(name, "")
    word = value.strip().lower()
    if not word:
        return None
    if word not in _ON | _OFF:
        raise InvalidOption(
            f"{name}={value!r}: expected 1 or 0 (or true/false, t/f, yes/no, y/n, on/off): {SWITCHES[name]}. Correct "
            "it, or unset it."
        )
    return word in _ON


def read_directory(name: str) -> Path | None:
    """Return the path that an environment variable of `DIRECTORIES` names; None where it is not set."""
    value = os.environ.get(name, "")
    return Path(value).expanduser() if value.strip() else None


_active: Options | None = None


def activate(options: Options | None) -> None:
    """Make `options` the ones that the hooks follow while training; None means the defaults."""
    global _active
    _active = options


def active() -> Options:
    """Return the active options, or the defaults where nothing was patched through PatchFastRL."""
    return _active if _active is not None else Options()
