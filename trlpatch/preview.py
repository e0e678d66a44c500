"""Preview: what would be patched in a TRL, without patching or importing it.

The command line and the golden files both read this model. It needs TRL's source only: an installation, a directory
or a wheel; neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotWrite, TrlNotFound, UnknownTarget
from trlpatch.outcomes import WHOLE_FILE, Outcome
from trlpatch.rewrite.plan import Plan, plan
from trlpatch.rewrite.registry import patches
from trlpatch.rewrite.rewriter import Rewritten, rewrite
from trlpatch.runtime.failures import describe
from trlpatch.source.coupling import stock_targets
from trlpatch.source.locate import SourceFile, TrlInstall, find_trl, missing, sources
from trlpatch.source.releases import NEWEST_TESTED
from trlpatch.source.targets import TARGETS


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
        }


@dataclass(frozen=True)
class Preview:
    """All files of one TRL that patches were tried on.

    Attributes:
        absent: files, by target, that the target table expects in this release and that are not there.
    """

    install: TrlInstall
    where: Path
    files: tuple[FilePreview, ...]
    absent: dict[str, str]

    @property
    def untested(self) -> bool:
        """Whether this release is newer than the newest one in golden/releases.toml."""
        return self.install.release > NEWEST_TESTED

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The patches that do not fit and the files that are not there."""
        unfit = (outcome for file in self.files for outcome in file.rewritten.failed)
        gone = (Outcome(target, WHOLE_FILE, "failed", f"{path} is not there") for target, path in self.absent.items())
        return (*unfit, *gone)

    @property
    def held_back(self) -> frozenset[str]:
        """Targets that fit but stay stock, because one that they share an engine with does not fit."""
        failed = {failure.target for failure in self.failures}
        return stock_targets(failed, [file.source.target.name for file in self.files]) - failed

    def drift(self) -> str:
        """Return what is known of every failure, for people; empty when all fits."""
        return "\n\n".join(describe(self.install, failure) for failure in self.failures)

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
            "untested": self.untested,
            "fits": not self.failures,
            "absent": self.absent,
            "held_back": sorted(self.held_back),
            "files": [file.to_dict() for file in self.files],
        }


def preview(
    trl_path: Path | None = None, targets: Collection[str] = (), skip: frozenset[str] = frozenset()
) -> Preview:
    """Rewrite the sources of a TRL in memory.

    Args:
        trl_path: a `trl` package directory, a directory holding one, or a wheel; None means the installed TRL.
        targets: names of the target table; empty means every target of the release.
        skip: names of patches to leave out.

    Raises:
        TrlNotFound: there is no TRL at `trl_path`.
        UnsupportedTrl: it is older than 0.18.0.
        UnparsableVersion: its version is not PEP 440.
        UnknownTarget: a name in `targets` is not in the table, or this release has no such file.
        UnknownPatch: a name in `skip` is no patch.
    """
    with _opened(trl_path) as directory:
        install = find_trl(directory)
        found = sources(install)
        gone = {target.name: f"trl/{path.relative_to(install.root).as_posix()}" for target, path in missing(install)}
    _check_targets(targets, {source.target.name for source in found} | set(gone), install)
    files = tuple(
        FilePreview(source, plan(source.target, install.release, skip), _rewritten(source, install, skip))
        for source in found
        if not targets or source.target.name in targets
    )
    absent = {name: path for name, path in gone.items() if not targets or name in targets}
    return Preview(install, trl_path or install.root, files, absent)


def _rewritten(source: SourceFile, install: TrlInstall, skip: frozenset[str]) -> Rewritten:
    try:
        return rewrite(source, install.release, skip=skip)
    except SyntaxError as error:
        reason = f"line {error.lineno} is not Python: {error.msg}"
        return Rewritten(source, source.text, (Outcome(source.target.name, WHOLE_FILE, "failed", reason),), ())


def _check_targets(targets: Collection[str], here: set[str], install: TrlInstall) -> None:
    for name in targets:
        if name not in TARGETS:
            raise UnknownTarget(f"Unknown target {name!r}. Known: {', '.join(TARGETS)}.")
        if name not in here:
            raise UnknownTarget(
                f"TRL {install.version} has no target {name!r}. It has: {', '.join(n for n in TARGETS if n in here)}."
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


@contextmanager
def _opened(trl_path: Path | None) -> Iterator[Path | None]:
    """Yield a directory for `trl_path`; a wheel is unpacked and removed again."""
    if trl_path is None or trl_path.is_dir():
        yield trl_path
        return
    if not trl_path.exists():
        raise TrlNotFound(f"No such file or directory: {trl_path}. Expected a TRL wheel or a directory holding `trl`.")
    with tempfile.TemporaryDirectory(prefix="trlpatch-") as scratch:
        try:
            with zipfile.ZipFile(trl_path) as wheel:
                wanted = [name for name in wheel.namelist() if name.endswith((".py", "METADATA"))]
                wheel.extractall(scratch, wanted)
        except zipfile.BadZipFile as error:
            raise TrlNotFound(
                f"{trl_path} is neither a directory nor a wheel ({error}). "
                "Get one with: pip download trl==1.16.0 --no-deps"
            ) from error
        yield Path(scratch)


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
