"""Patch report: what `PatchFastRL` did in this process, for people and for machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from trlpatch.options import active, in_force
from trlpatch.outcomes import Outcome
from trlpatch.runtime.loader import running_file

if TYPE_CHECKING:
    from rich.console import Group

    from trlpatch.runtime.report_view import FullReport, Summary

CacheState = Literal["hit", "miss", "memory", "off"]


class PatchReport:
    """The state of this process: what `PatchFastRL` did, and what engines and trainers do as of now.

    True where TRL is patched: `if trlpatch.status(): ...`. False before `PatchFastRL`, after `unpatch()`, where
    `TRLPATCH_DISABLE` is set, and where no patch was applied.

    Attributes:
        trl: the TRL version; empty where nothing was patched or trlpatch is disabled.
        entries: one per target and patch, in the order of the target table.
        files: the file that runs, per target; upstream's own where nothing was applied.
        modules: the module name, per target.
        cache: "hit", "miss" (written now), "memory" (the cache cannot be used) or "off" (stock), per target.
        milliseconds: wall time of the calls that made this report.
        disabled: `TRLPATCH_DISABLE` is set and nothing was done.
        rebound: modules that were imported before patching and were patched in place.
        unfixable: classes of yours, defined before patching, that the patches do not reach, and why.
        notes: facts to know, such as an untested release.
        absent: targets that this TRL does not have, by name, and why that is no failure.
    """

    # A plain class for the reason that `trlpatch.outcomes` gives.
    def __init__(
        self,
        trl: str = "",
        entries: tuple[Outcome, ...] = (),
        files: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        cache: Mapping[str, CacheState] | None = None,
        milliseconds: float = 0.0,
        disabled: bool = False,
        rebound: tuple[str, ...] = (),
        unfixable: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        absent: Mapping[str, str] | None = None,
    ) -> None:
        self.trl = trl
        self.entries = entries
        self.files: Mapping[str, str] = files or {}
        self.modules: Mapping[str, str] = modules or {}
        self.cache: Mapping[str, CacheState] = cache or {}
        self.milliseconds = milliseconds
        self.disabled = disabled
        self.rebound = rebound
        self.unfixable = unfixable
        self.notes = notes
        self.absent: Mapping[str, str] = absent or {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatchReport) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"PatchReport({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __bool__(self) -> bool:
        return self.patched

    @property
    def patched(self) -> bool:
        """Whether patches of TRL are in force."""
        return bool(self.applied)

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
    def logps(self) -> tuple[str, ...]:
        """The trainers that met `logps="chunked"`, as of now: what became of their logits and why, a line each."""
        if "trlpatch.hooks.logps" not in sys.modules:
            return ()
        described: list[str] = import_module("trlpatch.hooks.logps").describe()
        return tuple(described)

    @property
    def old_logps(self) -> tuple[str, ...]:
        """The trainers that met `old_logps="reuse"`, as of now: what became of the extra pass and why, a line each."""
        if "trlpatch.hooks.old_logps" not in sys.modules:
            return ()
        described: list[str] = import_module("trlpatch.hooks.old_logps").describe()
        return tuple(described)

    @property
    def checkpointing(self) -> tuple[str, ...]:
        """The models with `use_gradient_checkpointing="auto"`, as of now: which layers are recomputed, a line each."""
        if "trlpatch.policy.checkpointing" not in sys.modules:
            return ()
        described: list[str] = import_module("trlpatch.policy.checkpointing").describe()
        return tuple(described)

    @property
    def compat(self) -> tuple[str, ...]:
        """What `compat="on"` does, and which arguments it has translated as of now, a line each."""
        if "trlpatch.runtime.compat" not in sys.modules:
            return ()
        described: list[str] = import_module("trlpatch.runtime.compat").describe()
        return tuple(described)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        plain = {**vars(self), "bypassed": self.bypassed, "engines": self.engines, "old_logps": self.old_logps}
        plain["patched"] = self.patched
        plain["logps"] = self.logps
        plain["checkpointing"] = self.checkpointing
        plain["compat"] = self.compat
        plain["entries"] = [entry.to_dict() for entry in self.entries]
        return {name: _plain(value) for name, value in plain.items()}

    def extended_by(self, now: PatchReport) -> PatchReport:
        """Return the report of this call and the next one, which patched more targets or tried some again."""
        return PatchReport(
            trl=now.trl,
            disabled=now.disabled,
            entries=(*(entry for entry in self.entries if entry.target not in now.files), *now.entries),
            files={**self.files, **now.files},
            modules={**self.modules, **now.modules},
            cache={**self.cache, **now.cache},
            milliseconds=self.milliseconds + now.milliseconds,
            rebound=(*self.rebound, *now.rebound),
            unfixable=(*self.unfixable, *now.unfixable),
            notes=tuple(dict.fromkeys((*self.notes, *now.notes))),
            absent={**self.absent, **now.absent},
        )

    def __str__(self) -> str:
        """Return a summary: about ten lines of 80 columns. `full()` has everything."""
        return str(self._summary())

    def __rich__(self) -> Group:
        """Return the summary for a rich console."""
        return self._summary().__rich__()

    def _repr_html_(self) -> str:
        """Return the summary as a notebook shows it: a small table."""
        return self._summary().html()

    def full(self) -> FullReport:
        """Return everything, to print: a line per patch and per file, why each was skipped, what runs from where."""
        from trlpatch.runtime.report_view import FullReport

        return FullReport(self._headline(), list(self._tables()), list(self._lists()))

    def _summary(self) -> Summary:
        from trlpatch.runtime.report_view import Summary

        return Summary(self._headline(), list(self._rows()), self.full() if self.entries else None)

    def _headline(self) -> str:
        if self.disabled:
            return "trlpatch: disabled by TRLPATCH_DISABLE, TRL is stock"
        if not self.trl:
            count = len(self.engines)
            return f"trlpatch: not patched; {count or 'no'} {'engines' if count > 1 else 'engine'}"
        return f"trlpatch: TRL {self.trl}, {len(self.applied)} patches applied, {self.milliseconds:.0f} ms"

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Yield what a summary says: a name and a text, about ten of them."""
        from trlpatch.runtime.report_view import failure_lines, patched_lines, skip_lines

        patched = list(dict.fromkeys(entry.target for entry in self.applied))
        yield from patched_lines(patched)
        failed = [entry for entry in self.entries if entry.status == "failed"]
        yield from (("failed", line) for line in failure_lines(failed))
        # From TRL 0.28 on most of what a trainer needs is done in VLLMGeneration: nothing that is missing.
        done = {entry.patch for entry in self.applied}
        skipped = [entry for entry in self.entries if entry.status == "skipped" and entry.patch not in done]
        yield from (("skipped", line) for line in skip_lines(skipped))
        if stock := [target for target in self.files if target not in patched]:
            yield "stock", ", ".join(stock)
        if self.rebound:
            yield "in place", f"imported before PatchFastRL: {', '.join(self.rebound)}"
        for name, items in (
            ("no reach", [f"out of reach: {one}" for one in self.unfixable]),
            ("bypassed", [f"{one} runs from another file: another import hook came first" for one in self.bypassed]),
            ("engine", self.engines),
            ("logps", self.logps),
            ("old logps", self.old_logps),
            ("layers", self.checkpointing),
            ("compat", self.compat),
        ):
            yield from ((name, item) for item in items)
        if self.patched and in_force() and (off := active().off):
            yield "off", f"{', '.join(off)} (PatchFastRL)"
        if not self.trl and not self.disabled and self.engines:
            yield "to do", "a stock trainer does not use an engine: call trlpatch.PatchFastRL()"
        if self.absent:
            yield "absent", f"not in this TRL: {', '.join(self.absent)}"
        yield from (("note", note) for note in self.notes)
        if self.entries:
            yield "all of it", "print(trlpatch.status().full())"

    def _tables(self) -> Iterator[list[tuple[str, ...]]]:
        """Yield the patches and the files, each with its head; nothing where nothing was patched."""
        if not self.trl:
            return
        yield [
            ("TARGET", "PATCH", "STATUS", "DETAIL"),
            *(
                (entry.target, entry.patch, entry.status, entry.reason or f"fits trl {entry.variant}".rstrip())
                for entry in self.entries
            ),
        ]
        yield [
            ("TARGET", "CACHE", "FILE THAT RUNS"),
            *((target, self.cache.get(target, "off"), file) for target, file in self.files.items()),
        ]

    def _lists(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield what else there is to say: a title and its items."""
        for title, items in (
            ("patched in place (imported before PatchFastRL)", self.rebound),
            ("out of reach", self.unfixable),
            ("running from another file: another import hook came first", self.bypassed),
            ("engines", self.engines),
            ("log-probabilities", self.logps),
            ("old log-probabilities", self.old_logps),
            ("activation checkpointing", self.checkpointing),
            ("compat", self.compat),
            ("not in this TRL", tuple(f"{target}: {reason}" for target, reason in self.absent.items())),
            ("notes", self.notes),
        ):
            if items:
                yield title, items


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _same(found: str | None, expected: str) -> bool:
    return found is not None and os.path.realpath(found) == os.path.realpath(expected)
