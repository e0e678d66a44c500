"""What a patch is: frozen data that a patch file fills in, and the base class of its transformer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from trlpatch.source.releases import Release, ReleaseRange

if TYPE_CHECKING:
    from trlpatch.rewrite.edits import Insertion, PatchTransformer
    from trlpatch.rewrite.regions import Outline


@dataclass(frozen=True)
class Anchor:
    """A place in TRL's source that a patch must find.

    Attributes:
        name: what it is called in reports and manifests.
        triggers: texts of which every statement holding this anchor contains one. Other statements are not parsed.
            Empty for the anchors of an inserter.
        at_module_level: it stands outside every class and function, where it may only be replaced by one statement.
        looks_like: regular expression for lines to show when the anchor is not where it was expected.
        sign: a strict one for the anchor itself in one line. A target declared free of the patch must have no such
            line; empty where the anchor is harmless elsewhere.
    """

    name: str
    looks_like: str
    sign: str = ""
    triggers: tuple[str, ...] = ()
    at_module_level: bool = False


class Inserter(Protocol):
    """Finds where a patch's statements go; yields nothing where they already are."""

    def __call__(self, file: Outline, expected: Collection[Anchor]) -> Iterable[Insertion]: ...


@dataclass(frozen=True)
class Variant:
    """What a patch must find in one target over a range of TRL releases: each anchor with its exact count."""

    target: str
    trl: ReleaseRange
    anchors: Mapping[Anchor, int]


@dataclass(frozen=True)
class Hole:
    """Releases in which a target needs no such patch, and why. Reported as skipped."""

    target: str
    trl: ReleaseRange
    reason: str


@dataclass(frozen=True)
class Patch:
    """One behaviour, one file, one test file, one entry in docs/patches.md, one marker in the output.

    Attributes:
        name: equals the file name and the marker `# trlpatch: <name>`.
        summary: what is different afterwards, in one line.
        hooks: functions of `trlpatch.hooks` that the patched code calls.
        transformer: rewrites the statements that hold an anchor.
        inserter: says where statements are to be put in.
        requires: patches without which this one would be wrong; leaving one out leaves this one out too.
        repair: it makes releases work together that do not; a release that no variant names needs no repair.
        variants: what is expected where, per release range.
        holes: where it does not apply, with the reason.
    """

    name: str
    summary: str
    hooks: tuple[str, ...]
    transformer: type[PatchTransformer] | None = None
    inserter: Inserter | None = None
    requires: tuple[str, ...] = ()
    repair: bool = False
    variants: tuple[Variant, ...] = field(default=())
    holes: tuple[Hole, ...] = field(default=())

    @cached_property
    def targets(self) -> frozenset[str]:
        """Names of the targets this patch has a variant for."""
        return frozenset(variant.target for variant in self.variants)

    def variant(self, target: str, release: Release) -> Variant | None:
        """Return the variant for `target` in `release`, if there is one."""
        return next((v for v in self.variants if v.target == target and release in v.trl), None)

    def hole(self, target: str, release: Release) -> Hole | None:
        """Return the declared hole that covers `target` in `release`, if there is one."""
        return next((h for h in self.holes if h.target == target and release in h.trl), None)


def variants(table: Mapping[str, Mapping[str, Mapping[Anchor, int]]]) -> tuple[Variant, ...]:
    """Build variants from `{target: {range: {anchor: count}}}`, the form patch files are read in."""
    return tuple(
        Variant(target, ReleaseRange(trl), anchors)
        for target, ranges in table.items()
        for trl, anchors in ranges.items()
    )


def holes(table: Mapping[str, Mapping[str, str]]) -> tuple[Hole, ...]:
    """Build holes from `{target: {range: reason}}`."""
    return tuple(
        Hole(target, ReleaseRange(trl), reason) for target, ranges in table.items() for trl, reason in ranges.items()
    )
