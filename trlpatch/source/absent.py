"""Absent targets: files that the target table has in a release and that are not there, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from trlpatch.outcomes import WHOLE_FILE, Outcome
from trlpatch.source.locate import TrlInstall, missing
from trlpatch.source.search import class_files
from trlpatch.source.targets import TARGETS, Target


@dataclass(frozen=True)
class Absence:
    """A target whose file is not there.

    Attributes:
        reason: which file, where its classes are now, and who needs it.
        failed: it may not be passed over. What moved would run unpatched; a trainer that is there would run half
            patched without what it needs. A trainer that is gone from TRL can do neither.
    """

    target: Target
    reason: str
    failed: bool

    @property
    def outcome(self) -> Outcome:
        """The absence as a patch that failed, for reports."""
        return Outcome(self.target.name, WHOLE_FILE, "failed", self.reason)


def absences(install: TrlInstall, names: Collection[str]) -> tuple[Absence, ...]:
    """Return what of the targets `names` is absent from `install`, in the order of the target table."""
    gone = {target.name: target for target, _ in missing(install)}
    if gone.keys().isdisjoint(names):
        return ()
    present = [t for t in TARGETS.values() if t.location(install.release) is not None and t.name not in gone]
    needed_by = {name: target.name for target in present for name in target.coupled_with}
    trainers = any(target.kind == "trainer" for target in present)
    files = class_files(install.root, {name for target in gone.values() for name in target.classes})
    return tuple(
        Absence(
            target,
            _reason(install, target, files, needed_by.get(name, "")),
            failed=name in needed_by
            or any(one in files for one in target.classes)
            or (target.kind == "trainer" and not trainers),
        )
        for name, target in gone.items()
        if name in names
    )


def moved_classes(install: TrlInstall, target: Target) -> str:
    """Say where the classes of a target are that its own file does not define; empty where it defines all of them."""
    location = target.location(install.release)
    files = class_files(install.root, target.classes)
    if location is None or all(f"trl/{location.file}" in files.get(name, ()) for name in target.classes):
        return ""
    return _whereabouts(install, target, files)


def _reason(install: TrlInstall, target: Target, files: Mapping[str, tuple[str, ...]], needed_by: str) -> str:
    location = target.location(install.release)
    assert location is not None  # else it would not be missing
    file = f"trl/{location.file}"
    if needed_by:
        where = _whereabouts(install, target, files)
        return f"{needed_by} needs it, and its file {file} is not there" + (f": {where}" if where else "")
    if not target.classes:
        return f"its file {file} is not there"
    return f"{_whereabouts(install, target, files)}; trlpatch knows it at {file}"


def _whereabouts(install: TrlInstall, target: Target, files: Mapping[str, tuple[str, ...]]) -> str:
    here = (f"{name} is now in {' and '.join(files[name])}" for name in target.classes if name in files)
    lost = [name for name in target.classes if name not in files]
    nowhere = f"no file of TRL {install.version} defines {', '.join(lost)}"
    return "; ".join([*here, *([nowhere] if lost else [])])
