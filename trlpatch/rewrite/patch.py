"""Patch, variant and exemption: the frozen declarations that a patch file consists of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import Insertion, PatchTransformer
from trlpatch.rewrite.outline import Outline
from trlpatch.source.releases import Release, ReleaseRange


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
class Exemption:
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
        after: patches of the same folder that are applied, and reported, before this one.
        option: the argument of `PatchFastRL` that asks for it, such as `old_logps="reuse"`; empty if none has to.
        variants: what is expected where, per release range.
        exemptions: where it does not apply, with the reason.
    """

    name: str
    summary: str
    hooks: tuple[str, ...]
    transformer: type[PatchTransformer] | None = None
    inserter: Inserter | None = None
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    option: str = ""
    variants: tuple[Variant, ...] = field(default=())
    exemptions: tuple[Exemption, ...] = field(default=())

    @cached_property
    def targets(self) -> frozenset[str]:
        """Names of the targets this patch has a variant for."""
        return frozenset(variant.target for variant in self.variants)

    @cached_property
    def signs(self) -> tuple[Anchor, ...]:
        """The anchors of all variants that have a sign, each once."""
        every = (anchor for variant in self.variants for anchor in variant.anchors if anchor.sign is not None)
        return tuple(dict.fromkeys(every))

    def variant(self, target: str, release: Release) -> Variant | None:
        """Return the variant for `target` in `release`, if there is one."""
        return next((v for v in self.variants if v.target == target and release in v.trl), None)

    def exemption(self, target: str, release: Release) -> Exemption | None:
        """Return the exemption that covers `target` in `release`, if there is one."""
        return next((e for e in self.exemptions if e.target == target and release in e.trl), None)


def variants(table: Mapping[str, Mapping[str, Mapping[Anchor, int]]]) -> tuple[Variant, ...]:
    """Build variants from `{target: {range: {anchor: count}}}`, the form patch files are read in."""
    return tuple(
        Variant(target, ReleaseRange(trl), anchors)
        for target, ranges in table.items()
        for trl, anchors in ranges.items()
    )


def exemptions(table: Mapping[str, Mapping[str, str]]) -> tuple[Exemption, ...]:
    """Build exemptions from `{target: {range: reason}}`."""
    return tuple(
        Exemption(target, ReleaseRange(trl), reason)
        for target, ranges in table.items()
        for trl, reason in ranges.items()
    )
