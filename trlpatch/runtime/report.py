"""Patch report: what `PatchFastRL` did in this process, for people and for machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

from trlpatch.outcomes import Outcome
from trlpatch.runtime.loader import running_file

CacheState = Literal["hit", "miss", "memory", "off"]


@dataclass(frozen=True)
class PatchReport:
    """The state of this process after `PatchFastRL`.

    Attributes:
        trl: the TRL version; empty when trlpatch is disabled.
        entries: one per target and patch, in the order of the target table.
        files: the file that runs, per target; upstream's own where nothing was applied.
        modules: the module name, per target.
        cache: "hit", "miss" (written now), "memory" (the cache cannot be used) or "off" (stock), per target.
        milliseconds: wall time of the calls that made this report.
        disabled: `TRLPATCH_DISABLE` is set and nothing was done.
        rebound: modules that were imported before patching and were patched in place.
        unfixable: classes of yours, defined before patching, that the patches do not reach, and why.
        notes: facts to know, such as an untested release.
    """

    trl: str = ""
    entries: tuple[Outcome, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    cache: Mapping[str, CacheState] = field(default_factory=dict)
    milliseconds: float = 0.0
    disabled: bool = False
    rebound: tuple[str, ...] = ()
    unfixable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def applied(self) -> tuple[Outcome, ...]:
        """The entries whose patch runs."""
        return tuple(entry for entry in self.entries if entry.status == "applied")

    @property
    def bypassed(self) -> tuple[str, ...]:
        """Modules that run, as of now, from another file than `files` says.

        An import hook that was installed after `PatchFastRL` and does not ask the hooks behind it does this.
        """
        return tuple(
            module
            for target, module in self.modules.items()
            if module in sys.modules and not _same(running_file(sys.modules[module]), self.files[target])
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """The vLLM engines of this process as of now: how weights, adapters and sleep are done, a line each."""
        if "trlpatch.engine.state" not in sys.modules:  # nothing has met an engine yet
            return ()
        described: list[str] = import_module("trlpatch.engine.describe").describe_engines()
        return tuple(described)

    @property
    def old_logps(self) -> tuple[str, ...]:
        """The trainers that met `old_logps="reuse"`, as of now: what became of the extra pass and why, a line each."""
        if "trlpatch.hooks.old_logps" not in sys.modules:
            return ()
        described: list[str] = import_module("trlpatch.hooks.old_logps").describe()
        return tuple(described)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        plain = {**vars(self), "bypassed": self.bypassed, "engines": self.engines, "old_logps": self.old_logps}
        plain["entries"] = [entry.to_dict() for entry in self.entries]
        return {name: _plain(value) for name, value in plain.items()}

    def extended_by(self, now: PatchReport) -> PatchReport:
        """Return the report of this call and the next one, which patched more targets or tried some again."""
        return replace(
            now,
            entries=(*(entry for entry in self.entries if entry.target not in now.files), *now.entries),
            files={**self.files, **now.files},
            modules={**self.modules, **now.modules},
            cache={**self.cache, **now.cache},
            milliseconds=self.milliseconds + now.milliseconds,
            rebound=(*self.rebound, *now.rebound),
            unfixable=(*self.unfixable, *now.unfixable),
            notes=tuple(dict.fromkeys((*self.notes, *now.notes))),
        )

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        if self.disabled:
            return "trlpatch: disabled by TRLPATCH_DISABLE, TRL is stock"
        rows = [("TARGET", "PATCH", "STATUS", "DETAIL")]
        rows += [
            (entry.target, entry.patch, entry.status, entry.reason or f"fits trl {entry.variant}".rstrip())
            for entry in self.entries
        ]
        lines = [f"trlpatch: TRL {self.trl}, {len(self.applied)} patches applied, {self.milliseconds:.0f} ms", ""]
        lines += _aligned(rows)
        lines.append("")
        lines += _aligned(
            [("TARGET", "CACHE", "FILE THAT RUNS")]
            + [(target, self.cache.get(target, "off"), file) for target, file in self.files.items()]
        )
        lines += _listed("patched in place (imported before PatchFastRL)", self.rebound)
        lines += _listed("out of reach", self.unfixable)
        lines += _listed("running from another file: another import hook came first", self.bypassed)
        lines += _listed("engines", self.engines)
        lines += _listed("old log-probabilities", self.old_logps)
        lines += _listed("notes", self.notes)
        return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _listed(title: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    return ["", f"{title}:", *(f"  {item}" for item in found)] if found else []


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _same(found: str | None, expected: str) -> bool:
    return found is not None and os.path.realpath(found) == os.path.realpath(expected)
