"""The environment of the engines' processes: defaults that the user's own environment overrides."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

DEFAULTS = {
    "VLLM_USE_V1": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_ATTENTION_BACKEND": "FLASH_ATTN",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""What engines get where nothing else is said: no stale compile cache, functions as messages to workers, the engine's
core in the actor's own process."""

_ON_DEVICES = frozenset({"VLLM_ATTENTION_BACKEND"})
"""Of a GPU; vLLM's CPU backend has none to choose."""

FORWARDED = ("VLLM_", "HF_", "TRLPATCH_", "NCCL_", "OMP_", "TORCH")
"""Variables of the trainer's process that actors get, by how they begin: Ray forwards none to a running cluster."""

_OF_ONE_PROCESS = frozenset({"VLLM_HOST_IP", "VLLM_PORT", "VLLM_RPC_BASE_PATH"})
"""Not forwarded: addresses of the trainer's own host."""

PORTS = 10
"""Of one engine, where VLLM_PORT is set."""

RAY_DEFAULTS = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""For a cluster that is started here. Ray's workers are nice 15 otherwise: on the trainer's host, engines starve."""


def engine_environment(
    own: Mapping[str, str] | None = None, *, devices: bool = True, known: frozenset[str] | None = None
) -> dict[str, str]:
    """The variables for the processes of engines, on GPUs or not.

    `own` is the trainer's environment, which wins; `known` are the variables that this vLLM has: later releases warn
    of those that they have dropped (VLLM_USE_V1, VLLM_ATTENTION_BACKEND).
    """
    own = os.environ if own is None else own
    known = vllm_variables() if known is None else known
    made = {
        name: value
        for name, value in DEFAULTS.items()
        if (not known or name in known) and (devices or name not in _ON_DEVICES)
    }
    forwarded = {name for name in own if name.startswith(FORWARDED)} - _OF_ONE_PROCESS
    return made | {name: own[name] for name in sorted(forwarded)}


def engine_port(index: int, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """VLLM_PORT of one engine, where the trainer's environment has one; each has ten ports from there on.

    A cluster that was started here gives the trainer's to every actor. vLLM looks for a port that is free from there
    on and listens on it later: engines that start together would take the same.
    """
    given = (os.environ if own is None else own).get("VLLM_PORT", "")
    return {"VLLM_PORT": str(int(given) + PORTS * (index + 1))} if given.isdecimal() else {}


def vllm_variables() -> frozenset[str]:
    """Names of the variables in the installed vLLM's envs.py, without importing it; none where it is not installed."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec and spec.submodule_search_locations) or ():
        source = Path(place) / "envs.py"
        if source.is_file():
            return frozenset(re.findall(r'^    "(VLLM_\w+)":', source.read_text(encoding="utf-8"), re.MULTILINE))
    return frozenset()
