"""Which patches apply to a source file, in which variant, and which do not and why: a pure function."""

from __future__ import annotations

from dataclasses import dataclass

from trlpatch.rewrite.patch import Patch, Variant
from trlpatch.rewrite.registry import left_out, patches
from trlpatch.source.releases import Release
from trlpatch.source.targets import Target


@dataclass(frozen=True)
class Step:
    """A patch to apply, in the variant that fits the release."""

    patch: Patch
    variant: Variant


@dataclass(frozen=True)
class Skip:
    """A patch that does not apply.

    Attributes:
        forbids: the target must be free of the patch's anchors: they are declared to live elsewhere.
    """

    patch: Patch
    reason: str
    forbids: bool


@dataclass(frozen=True)
class Plan:
    """What will happen to one target."""

    target: str
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...]


def plan(target: Target, release: Release, skip: frozenset[str] = frozenset()) -> Plan:
    """Return the plan for `target` in `release` with the patches in `skip` left out.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist.
    """
    excluded = left_out(skip)
    steps: list[Step] = []
    skips: list[Skip] = []
    for patch in patches():
        variant = patch.variant(target.name, release)
        hole = patch.hole(target.name, release)
        if variant is None:
            if hole is not None or target.kind != "config":
                reason = hole.reason if hole is not None else "no such code in this target"
                skips.append(Skip(patch, reason, forbids=True))
        elif patch.name in excluded:
            skips.append(Skip(patch, excluded[patch.name], forbids=False))
        else:
            steps.append(Step(patch, variant))
    return Plan(target.name, tuple(steps), tuple(skips))
