"""Several changes at once: a hypothesis strategy that applies kinds to each other's results.

A release changes more than one thing. What is harmless alone is harmless beside others; what is
refused alone is refused beside harmless changes.
"""

from __future__ import annotations

import ast

from hypothesis import strategies as st

from tests.mutation import mutants
from tests.mutation.hosts import Host, rollout_hosts
from tests.mutation.mutants import Kind, Mutant

UNFIT = frozenset({"formatted_on_one_line"})
"""Kinds whose result other kinds cannot take as a host."""


def _applied(one: Kind, host: Host, number: int) -> Host:
    """Return the host after one change, or as it was where the kind has nothing to change."""
    made = list(mutants.of(one, host))
    if not made:
        return host
    text = made[number % len(made)].files.get(host.path)
    try:
        ast.parse(text or "")
    except SyntaxError:
        return host
    return Host(host.release, host.path, host.cls, text) if text else host


def _single_file(category: str) -> list[Kind]:
    found = [one for one in mutants.every_kind().values() if one.category == category and one.name not in UNFIT]
    return [one for one in found if _takes_rollout_hosts(one)]


def _takes_rollout_hosts(one: Kind) -> bool:
    first = next(rollout_hosts("1.16.0"))
    return first in tuple(one.hosts("1.16.0"))


@st.composite
def composed(draw: st.DrawFn, release: str, harmful: str = "") -> Mutant:
    """Draw a mutant of two to four harmless changes, after one of the categories in `harmful` if any."""
    host = draw(st.sampled_from([host for host in rollout_hosts(release) if host.cls]))
    original = host
    names: list[str] = []
    if harmful:
        one = draw(st.sampled_from([kind for letter in harmful for kind in _single_file(letter)]))
        host = _applied(one, host, draw(st.integers(0, 3)))
        names.append(one.name)
    for one in draw(st.lists(st.sampled_from(_single_file("B")), min_size=2, max_size=4, unique_by=lambda k: k.name)):
        host = _applied(one, host, draw(st.integers(0, 3)))
        names.append(one.name)
    category = harmful or "B"
    return Mutant(
        "+".join(names), category[0], release, original.name, 0, {host.path: host.text}, harmless=not harmful
    )
