"""Patch registry: discovers the patch modules and sorts them topologically into the order of application."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module

from trlpatch.errors import UnknownPatch
from trlpatch.rewrite.patch import Patch

_FOLDERS = (
    "trlpatch.rewrite.patches.rollout",
    "trlpatch.rewrite.patches.speed",
    "trlpatch.rewrite.patches.repairs",
)


@cache
def patches() -> tuple[Patch, ...]:
    """Return every patch in order of application: the rollout patches, the speed patches, then the repairs.

    Raises:
        ValueError: the `after` of the patches cannot be followed, see `ordered`.
    """
    return (*rollout_patches(), *speed_patches(), *repairs())


@cache
def rollout_patches() -> tuple[Patch, ...]:
    """Return the patches whose hooks decide where and how rollouts run."""
    return ordered(_discovered(_FOLDERS[0]))


@cache
def speed_patches() -> tuple[Patch, ...]:
    """Return the patches that leave out work and that an option of `PatchFastRL` has to ask for."""
    return ordered(_discovered(_FOLDERS[1]))


@cache
def repairs() -> tuple[Patch, ...]:
    """Return the patches for combinations of releases that do not work together otherwise.

    A release that none of a repair's variants names needs no repair.
    """
    return ordered(_discovered(_FOLDERS[2]))


def _discovered(folder: str) -> list[Patch]:
    names = (module.name for module in pkgutil.iter_modules(import_module(folder).__path__, f"{folder}."))
    return [import_module(name).PATCH for name in names]


def ordered(found: Iterable[Patch]) -> tuple[Patch, ...]:
    """Sort patches so that each comes behind all that its `after` names; what is free is sorted by name.

    Raises:
        ValueError: an `after` names no patch of `found`, or the patches wait for each other.
    """
    by_name = {patch.name: patch for patch in found}
    for patch in by_name.values():
        if unknown := sorted(set(patch.after) - by_name.keys()):
            raise ValueError(f"patch {patch.name}: after={unknown!r} names no patch of its folder")
    sorter = TopologicalSorter({patch.name: patch.after for patch in by_name.values()})
    sorter.prepare()  # CycleError is a ValueError
    result: list[Patch] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        result += (by_name[name] for name in ready)
        sorter.done(*ready)
    return tuple(result)


def left_out(skip: frozenset[str]) -> dict[str, str]:
    """Return the patches that `skip` leaves out, with reasons, including those that would be wrong without them.

    Raises:
        UnknownPatch: `skip` names a patch that does not exist.
    """
    known = {patch.name for patch in patches()}
    if unknown := sorted(skip - known):
        import difflib  # for messages alone

        close = dict.fromkeys(one for name in unknown for one in difflib.get_close_matches(name, sorted(known), n=1))
        meant = f"; did you mean {', '.join(map(repr, close))}?" if close else "."
        raise UnknownPatch(
            f"skip={unknown!r} names no patch{meant} Known: {', '.join(sorted(known))}. See: trlpatch list"
        )
    reasons = dict.fromkeys(skip, "left out by skip")
    grown = True
    while grown:
        grown = False
        for patch in patches():
            needed = next((name for name in patch.requires if name in reasons), None)
            if patch.name not in reasons and needed is not None:
                reasons[patch.name] = f"needs {needed}, which is left out"
                grown = True
    return reasons
