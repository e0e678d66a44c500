"""Options: the arguments of `PatchFastRL`, which of them are in force, and the environment variables.

The active options live here and not with the hooks, so that a warm start imports no hook.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from trlpatch.errors import InvalidOption

Colocate = Literal["auto", "always", "never"]
Sleep = Literal["auto", "on", "off", "kv"]
Adapter = Literal["auto", "request", "merge", "off"]
OnDrift = Literal["raise", "stock"]
Logps = Literal["stock", "chunked"]
OldLogps = Literal["stock", "reuse"]
LoraLayers = Literal["auto", "trlpatch", "vllm"]
Compat = Literal["off", "on"]

ALLOWED: dict[str, tuple[str, ...]] = {
    "colocate": get_args(Colocate),
    "sleep": get_args(Sleep),
    "adapter": get_args(Adapter),
    "on_drift": get_args(OnDrift),
    "logps": get_args(Logps),
    "old_logps": get_args(OldLogps),
    "lora_layers": get_args(LoraLayers),
    "compat": get_args(Compat),
}
"""The options that are one of several words, and the words."""


class Options:
    """The checked arguments of one `PatchFastRL` call, whose documentation says what each means.

    Only `skip`, `logps` and `old_logps` change the patched text; `skip` is kept sorted and without repeats. The hooks
    read `colocate`, `sleep`, `adapter`, `lora_layers` and `compat` while training.

    Raises:
        InvalidOption: a value is outside its list or has the wrong type.
    """

    # A plain class for the reason that `trlpatch.outcomes` gives.
    def __init__(
        self,
        algorithm: str | None = None,
        colocate: Colocate = "auto",
        sleep: Sleep = "auto",
        adapter: Adapter = "auto",
        on_drift: OnDrift = "raise",
        skip: Iterable[str] = (),
        old_logps: OldLogps = "stock",
        lora_layers: LoraLayers = "auto",
        logps: Logps = "stock",
        compat: Compat = "off",
    ) -> None:
        self.algorithm = algorithm
        self.colocate = colocate
        self.sleep = sleep
        self.adapter = adapter
        self.on_drift = on_drift
        self.old_logps = old_logps
        self.lora_layers = lora_layers
        self.logps = logps
        self.compat = compat
        self.skip = self._checked(skip)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Options({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def _checked(self, skip: object) -> tuple[str, ...]:
        """Return `skip` sorted and without repeats."""
        algorithm: object = self.algorithm
        if algorithm is not None and not isinstance(algorithm, str):
            raise InvalidOption(
                f"PatchFastRL(algorithm={self.algorithm!r}): expected a trainer's short name such as 'grpo', or None "
                f"for all of them, found {type(self.algorithm).__name__}. See: trlpatch list"
            )
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidOption(f"PatchFastRL({name}={value!r}): expected one of {', '.join(map(repr, allowed))}.")
        named = isinstance(skip, tuple | list | set | frozenset)
        if not isinstance(skip, tuple | list | set | frozenset) or not all(isinstance(name, str) for name in skip):
            raise InvalidOption(
                f"PatchFastRL(skip={skip!r}): expected a tuple, list or set of patch names such as ('sleep',), and "
                f"() for none, found {type(skip).__name__}{' with other things than names' if named else ''}. See: "
                "trlpatch list"
            )
        return tuple(sorted(set(skip)))

    @property
    def asked_for(self) -> tuple[str, ...]:
        """Names of the optional patches that these options ask for."""
        asked = {"logps": self.logps == "chunked", "old_logps": self.old_logps == "reuse"}
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def off(self) -> tuple[str, ...]:
        """What `PatchFastRL` would have to be given for what it does only if it is asked, as it is written."""
        return tuple(f'{name}="{ALLOWED[name][1]}"' for name in _ASKED if getattr(self, name) == ALLOWED[name][0])


_ASKED = ("old_logps", "logps", "compat")

DISABLE = "TRLPATCH_DISABLE"
SLEEP = "TRLPATCH_SLEEP"
SLEEP_ALIAS = "UNSLOTH_VLLM_STANDBY"
VLLM_ON_GB10 = "TRLPATCH_VLLM_ON_GB10"
QUIET = "TRLPATCH_QUIET"
CACHE_DIR = "TRLPATCH_CACHE_DIR"
DUMP = "TRLPATCH_DUMP"
MERGE_KERNEL = "TRLPATCH_MERGE_KERNEL"

SWITCHES = {
    DISABLE: "whether PatchFastRL() does nothing and TRL stays stock",
    SLEEP: "whether an engine is built with sleep mode where enable_sleep_mode is not given",
    SLEEP_ALIAS: f"what {SLEEP} says, in Unsloth's words; {SLEEP} wins",
    VLLM_ON_GB10: "whether vLLM is used on DGX Spark (GB10)",
    MERGE_KERNEL: "whether weights in place are merged and summed by Triton kernels instead of torch's operations",
    QUIET: "whether `trlpatch run` does not say on stderr what it patched",
}
"""The environment variables that are on or off, and what each decides."""

DIRECTORIES = {
    CACHE_DIR: "where patched files are kept, instead of the user's cache directory",
    DUMP: "where PatchFastRL() also writes the files that run",
}
"""The environment variables that name a directory."""

SECONDS = {
    "TRLPATCH_RAY_CLUSTER_TIMEOUT": "how long Ray may take to start, to be joined, to say what is free, and to end",
    "TRLPATCH_RAY_INIT_TIMEOUT": "how long an engine on a Ray actor may take to come up",
    "TRLPATCH_RAY_HEALTH_TIMEOUT": "how long such an engine may go without a step, or its actor without an answer",
    "TRLPATCH_RAY_SYNC_TIMEOUT": "how long such engines may take to take over an adapter or weights",
    "TRLPATCH_RAY_ROLLOUT_TIMEOUT": "how long such an engine may take to answer its prompts",
    "TRLPATCH_RAY_ABORT_TIMEOUT": "how long such an engine may take to drop the requests of an interrupted rollout",
}
"""The environment variables that are a number of seconds."""

LAUNCHERS = {
    "WORLD_SIZE": "how many ranks torchrun or accelerate launch has started",
    "LOCAL_RANK": "the number of this rank on its host",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "the ZeRO stage that accelerate launch was told",
}
"""The environment variables of launchers that are read here, each a whole number."""

CHILDREN = "TRLPATCH_CHILDREN"
"""The variable in which `trlpatch run` hands its options down to child processes; nobody else sets it."""

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
    """Return the path that an environment variable of `DIRECTORIES` names; None where it is not set.

    Raises:
        InvalidOption: it begins with a home directory that cannot be determined.
    """
    value = os.environ.get(name, "")
    try:
        return Path(value).expanduser() if value.strip() else None
    except RuntimeError as error:
        raise InvalidOption(
            f"{name}={value!r}: expected a directory: {DIRECTORIES[name]}. The home directory "
            f"{value.split('/')[0]!r} cannot be determined. Write the directory out, or unset it."
        ) from error


def read_seconds(name: str) -> float | None:
    """Return the seconds that an environment variable of `SECONDS` says; None where it is not set, or set to nothing.

    Raises:
        InvalidOption: it says no positive number; `inf` is one.
    """
    value = os.environ.get(name, "")
    if not value.strip():
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # nor is NaN
        raise InvalidOption(
            f"{name}={value!r}: expected a positive number of seconds, or inf: {SECONDS[name]}. Correct it, or unset "
            "it."
        )
    return seconds


def read_launcher(name: str, default: int, environ: Mapping[str, str] | None = None) -> int:
    """Return the number that a launcher has set in `environ`, `os.environ` by default; `default` where it set none.

    Raises:
        InvalidOption: it is no whole number from 0 on.
    """
    value = (os.environ if environ is None else environ).get(name, "").strip()
    if not value:
        return default
    if not (value.isascii() and value.isdecimal()):
        raise InvalidOption(
            f"{name}={value!r}: expected a whole number, {LAUNCHERS[name]}. Start with torchrun or accelerate launch, "
            "which set it, or unset it."
        )
    return int(value)


_DEFAULTS = Options()
_active: Options | None = None


def activate(options: Options | None) -> None:
    """Make `options` the ones that the hooks follow while training; None means the defaults."""
    global _active
    _active = options


def active() -> Options:
    """Return the active options, or the defaults where nothing was patched through PatchFastRL."""
    return _active if _active is not None else _DEFAULTS


def in_force() -> bool:
    """Tell whether `PatchFastRL()` has patched this process, and `unpatch()` has not undone it."""
    return _active is not None
