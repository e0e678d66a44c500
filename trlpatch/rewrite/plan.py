"""Patch plan of a source file: which patches apply, in which variant, and which do not and why. A pure function."""

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
    """What will happen to one target.

    Attributes:
        absent: patches that have nothing to do with this target; not reported, but it must be free of their anchors.
        excluded: names of the patches that are left out of every target.
        off: patches that fit and that an option would have to ask for.
    """

    target: str
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...]
    absent: tuple[Skip, ...] = ()
    excluded: frozenset[str] = frozenset()
    off: tuple[Patch, ...] = ()


def plan(
    target: Target, release: Release, skip: frozenset[str] = frozenset(), asked_for: frozenset[str] = frozenset()
) -> Plan:
    """Return the plan for `target` in `release` with the patches in `skip` left out.

    Patches that an option has to ask for are part of it only if `asked_for` names them.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist.
    """
    excluded = left_out(skip)
    steps: list[Step] = []
    skips: list[Skip] = []
    absent: list[Skip] = []
    off: list[Patch] = []
    for patch in patches():
        variant = patch.variant(target.name, release)
        if patch.option and patch.name not in asked_for:
            off += [patch] if variant is not None else []
            continue
        exemption = patch.exemption(target.name, release)
        if variant is None and exemption is not None:
            skips.append(Skip(patch, exemption.reason, forbids=True))
        elif variant is None and target.kind != "support":
            absent.append(Skip(patch, "this target has no such code", forbids=True))
        elif variant is not None and patch.name in excluded:
            skips.append(Skip(patch, excluded[patch.name], forbids=False))
        elif variant is not None:
            steps.append(Step(patch, variant))
    return Plan(target.name, tuple(steps), tuple(skips), tuple(absent), frozenset(excluded), tuple(off))
