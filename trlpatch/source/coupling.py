"""Coupled targets: files whose trainers share one engine, so that they are patched together or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from trlpatch.source.targets import TARGETS


def components(names: Iterable[str]) -> list[frozenset[str]]:
    """Return the connected components of the targets' `coupled_with` among `names`: each is one transaction."""
    remaining = list(names)
    result = []
    while remaining:
        component = {remaining.pop(0)}
        grown = True
        while grown:
            linked = {name for name in remaining if any(_coupled(name, member) for member in component)}
            remaining = [name for name in remaining if name not in linked]
            component |= linked
            grown = bool(linked)
        result.append(frozenset(component))
    return result


def stock_targets(failed: Collection[str], present: Iterable[str]) -> frozenset[str]:
    """Return the targets that must stay stock: those that failed and all of `present` that they are coupled with."""
    names = dict.fromkeys([*present, *sorted(failed)])
    return frozenset().union(*(component for component in components(names) if not component.isdisjoint(failed)))


def _coupled(one: str, other: str) -> bool:
    return one in TARGETS[other].coupled_with or other in TARGETS[one].coupled_with
