"""Report on the environment: which TRL, which of its targets are in the cache, what is installed beside it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trlpatch.compatibility.verdict import Verdict, installed, judge
from trlpatch.options import DISABLE, read_switch
from trlpatch.runtime.cache import Cache, entry_key, rules_digest
from trlpatch.source.absent import absences
from trlpatch.source.locate import find_trl, sources
from trlpatch.source.releases import NEWEST_TESTED
from trlpatch.source.targets import TARGETS
from trlpatch.versions import installed_version

COMPANIONS = ("trlpatch", "trl", "vllm", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "libcst")


@dataclass(frozen=True)
class EnvironmentReport:
    """What the next `PatchFastRL()` of this environment will meet. Nothing is imported, written or patched.

    Attributes:
        cached: per target of the release, whether its patched file lies in the cache.
        absent: targets whose file is not there, and why.
        cache_writable: whether the cache directory, or the nearest existing one above it, can be written.
        packages: installed versions by distribution; None for what is not installed.
        loading: what `FastLanguageModel` lacks here, and the argument to set; empty when every package is there.
        verdict: whether the installed versions ran together, or are known not to.
    """

    trl: str
    where: str
    untested: bool
    disabled: bool
    cached: dict[str, bool]
    absent: dict[str, str]
    cache: str
    cache_bytes: int
    cache_writable: bool
    packages: dict[str, str | None]
    loading: tuple[str, ...]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {**asdict(self), "verdict": self.verdict.to_dict()}


def inspect_environment() -> EnvironmentReport:
    """Look at the installed TRL and at the cache.

    Raises:
        TrlNotFound, UnsupportedTrl, UnparsableVersion: there is no TRL that can be patched.
        InvalidOption: TRLPATCH_DISABLE is neither yes nor no.
    """
    install = find_trl()
    cache, rules = Cache(), rules_digest()
    cached = {
        source.target.name: cache.read(
            entry_key(
                target=source.target.name,
                release=install.release,
                upstream_sha256=source.sha256,
                skip=(),
                rules=rules,
            ),
            source.path.name,
        )
        is not None
        for source in sources(install)
    }
    return EnvironmentReport(
        trl=install.version,
        where=str(install.root),
        untested=install.release > NEWEST_TESTED,
        disabled=bool(read_switch(DISABLE)),
        cached=cached,
        absent={one.target.name: one.reason for one in absences(install, TARGETS.keys())},
        cache=str(cache.root),
        cache_bytes=cache.size(),
        cache_writable=_writable(cache.root),
        packages={name: installed_version(name) for name in COMPANIONS},
        loading=_loading(),
        verdict=judge(install, installed()),
    )


def _loading() -> tuple[str, ...]:
    always = ("torch", "transformers", "peft")
    absent = {name for name in (*always, "vllm", "bitsandbytes") if not importlib.util.find_spec(name)}
    needed = [name for name in always if name in absent]
    if needed:
        return (f"needs {', '.join(needed)}",)
    found = []
    if "vllm" in absent:
        found.append("without vLLM: fast_inference=False only")
    if "bitsandbytes" in absent:
        found.append("without bitsandbytes: load_in_4bit=False only")
    return tuple(found)


def _writable(directory: Path) -> bool:
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)
