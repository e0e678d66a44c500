"""Preview: what would be patched in a TRL, without patching or importing it.

The command line and the golden files both read this model. It needs TRL's source only: an installation, a directory
or a wheel; neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotWrite, UnknownTarget
from trlpatch.outcomes import Outcome
from trlpatch.rewrite.census.findings import in_modules
from trlpatch.rewrite.plan import Plan, plan
from trlpatch.rewrite.registry import patches
from trlpatch.rewrite.rewriter import Rewritten, rewrite
from trlpatch.runtime.failures import describe_all
from trlpatch.runtime.fit import Fit, judge_fit
from trlpatch.source.absent import absences
from trlpatch.source.locate import STAYS_STOCK, WITHOUT_ENGINE, SourceFile, TrlInstall, find_trl, sources, trainer_key
from trlpatch.source.targets import TARGETS
from trlpatch.source.wheel import opened


@dataclass(frozen=True)
class FilePreview:
    """One TRL file before and after."""

    source: SourceFile
    plan: Plan
    rewritten: Rewritten

    @cached_property
    def name(self) -> str:
        """Path inside the distribution, with slashes: `trl/trainer/grpo_trainer.py`."""
        return self.source.name

    def diff(self, context: int = 3) -> str:
        """Return the unified diff from upstream to patched text; its headers hold no dates and no machine paths."""
        return "".join(
            difflib.unified_diff(
                self.source.text.splitlines(keepends=True),
                self.rewritten.text.splitlines(keepends=True),
                f"a/{self.name}",
                f"b/{self.name}",
                n=context,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a machine reads of this file."""
        return {
            "target": self.source.target.name,
            "file": self.name,
            "upstream_sha256": self.source.sha256,
            "patched_sha256": self.rewritten.sha256,
            "patches": [_outcome_dict(outcome) for outcome in self.rewritten.outcomes],
            "off": {patch.name: patch.option for patch in self.plan.off},
        }


@dataclass(frozen=True)
class Preview:
    """All files of one TRL that patches were tried on, and how they fit."""

    install: TrlInstall
    where: Path
    files: tuple[FilePreview, ...]
    fit: Fit

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """What does not fit: patches, absent files that may not be passed over, modules that use an engine."""
        return self.fit.refused

    @property
    def absent(self) -> dict[str, str]:
        """Targets that the target table has in this release and whose file is not there, and why."""
        return {one.target.name: one.reason for one in self.fit.absences}

    def drift(self) -> str:
        """Return what is known of every failure, for people; empty when all fits."""
        return describe_all(self.fit)

    def dump(self, directory: Path) -> list[Path]:
        """Write the patched files to `directory/<release>/trl/...` and return their paths.

        Raises:
            CannotWrite: the directory cannot be written.
        """
        written = []
        for file in self.files:
            path = directory / self.install.version / file.name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(file.rewritten.text, encoding="utf-8", newline="")
            except OSError as error:
                reason = error.strerror or str(error)
                raise CannotWrite(f"Cannot write {path}: {reason}. Name another directory with --out.") from error
            written.append(path)
        return written

    def to_dict(self) -> dict[str, Any]:
        """Return what a machine reads of a check."""
        return {
            "trl": self.install.version,
            "where": str(self.where),
            "untested": self.fit.untested,
            "fits": not self.failures,
            "verdict": self.fit.verdict,
            "absent": self.absent,
            "failures": [{"target": failure.target, **_outcome_dict(failure)} for failure in self.failures],
            "held_back": sorted(self.fit.held_back),
            "untaught": [{"target": one.target, **_outcome_dict(one)} for one in self.fit.untaught],
            "files": [file.to_dict() for file in self.files],
        }


def preview(
    trl_path: Path | None = None,
    targets: Collection[str] = (),
    skip: frozenset[str] = frozenset(),
    asked_for: frozenset[str] = frozenset(),
) -> Preview:
    """Rewrite the sources of a TRL in memory.

    Args:
        trl_path: a `trl` package directory, a directory holding one, or a wheel; None means the installed TRL.
        targets: names of the target table or of its classes, spelled as `PatchFastRL` takes them ("GRPO",
            "grpo_trainer", "GRPOConfig"); empty means every target of the release.
        skip: names of patches to leave out.
        asked_for: names of optional patches to try as well.

    Raises:
        TrlNotFound: there is no TRL at `trl_path`.
        UnreadableSource: a file of it cannot be read or is not UTF-8.
        UnsupportedTrl: it is older than 0.18.0.
        UnparsableVersion: its version is not PEP 440.
        UnknownTarget: a name in `targets` is not in the table, or this release has no such file.
        UnknownPatch: a name in `skip` is no patch.
    """
    with opened(trl_path) as trl:
        install = find_trl(trl.directory)
        found = [SourceFile(one.target, trl.shown(one.path), one.module, one.text) for one in sources(install)]
        targets = [_spelled(name) for name in targets]
        _check_targets(targets, install, [source.target.name for source in found])
        wanted = frozenset(targets or TARGETS)
        found = [source for source in found if source.target.name in wanted]
        rewritten = [rewrite(source, install.release, skip=skip, asked_for=asked_for) for source in found]
        failed = [failure for one in rewritten for failure in one.failed]
        fit = judge_fit(install, found, wanted, failed, [] if targets else in_modules(install, trl.shown))
        plans = [plan(one.source.target, install.release, skip, asked_for) for one in rewritten]
        files = tuple(FilePreview(one.source, steps, one) for one, steps in zip(rewritten, plans, strict=True))
    install = install._replace(root=trl.shown(install.root))
    return Preview(install, trl_path or install.root, files, fit._replace(install=install))


def _check_targets(targets: Collection[str], install: TrlInstall, present: Collection[str]) -> None:
    for name in targets:
        if name not in TARGETS:
            raise UnknownTarget(f"Unknown target {name!r}{_meant(name)} Known: {', '.join(TARGETS)}.")
        absent = absences(install, [name])
        if name not in present and not any(one.failed for one in absent):
            raise UnknownTarget(
                f"TRL {install.version} has no target {name!r}{''.join(f': {one.reason}' for one in absent)}. "
                f"It has: {', '.join(present)}."
            )


def catalogue() -> list[dict[str, Any]]:
    """Return every patch in order of application: what it is for, and its release ranges per target."""
    return [
        {
            "patch": patch.name,
            "summary": patch.summary,
            "requires": list(patch.requires),
            "hooks": list(patch.hooks),
            "targets": {
                target: [str(variant.trl) for variant in patch.variants if variant.target == target]
                for target in dict.fromkeys(variant.target for variant in patch.variants)
            },
        }
        for patch in patches()
    ]


def _outcome_dict(outcome: Outcome) -> dict[str, Any]:
    entry: dict[str, Any] = {"patch": outcome.patch, "status": outcome.status}
    if outcome.variant:
        entry["range"] = outcome.variant
    if outcome.anchors:
        entry["anchors"] = dict(sorted(outcome.anchors.items()))
    if outcome.reason:
        entry["reason"] = outcome.reason
    if outcome.drift:
        entry["drift"] = outcome.drift._asdict()
    return entry


def _plain(name: str) -> str:
    return name.lower().removesuffix(".py").replace("-", "").replace("_", "")


_SPELLINGS = {
    _plain(spelling): name
    for name, target in TARGETS.items()
    for spelling in (name, *target.classes, *([f"{name}_trainer"] if target.kind == "trainer" else []))
}


def _spelled(name: str) -> str:
    """Return the name of the target that is meant, as `PatchFastRL("GRPOTrainer")` is understood; else `name`."""
    return _SPELLINGS.get(_plain(name), name)


def _meant(name: str) -> str:
    """`; did you mean 'grpo'?` for "gpro" and "GPROTrainer"; why "sft" is none; else a full stop."""
    key = trainer_key(name)
    if key in WITHOUT_ENGINE:
        return f": {STAYS_STOCK}, and needs no patch."
    close = difflib.get_close_matches(key, TARGETS, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
