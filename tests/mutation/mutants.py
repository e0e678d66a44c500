"""Mutants, and the registry of kinds: one function per kind, which yields what a host may be changed into."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from tests.mutation import hosts
from tests.mutation.hosts import Host

CATEGORIES = {
    "R": "existing rollout call rewritten",
    "A": "a second rollout site added",
    "S": "weight sync changed",
    "Z": "sleep, wake and reload changed",
    "E": "engine construction changed",
    "F": "config dataclass edited",
    "C": "config field renamed everywhere",
    "N": "modules new, moved, removed",
    "B": "harmless: must not be refused",
}

Change = str | dict[str, str | None] | None
"""A host's new text; or new texts by path, None for a file that is gone. None where a kind has nothing to change."""

Source = Callable[[str], Iterable[Host]]


@dataclass(frozen=True)
class Kind:
    """One way in which upstream's text may change.

    Attributes:
        former_survivor: it was once applied and wrong without an error; a sample has all of these.
    """

    category: str
    name: str
    imitates: str
    make: Callable[[Host], Change | Iterator[Change]]
    hosts: Source
    former_survivor: bool = False

    @property
    def harmless(self) -> bool:
        return self.category == "B"


@dataclass(frozen=True)
class Mutant:
    """One change of one release: new texts by path."""

    kind: str
    category: str
    release: str
    host: str
    number: int
    files: dict[str, str | None] = field(hash=False)
    harmless: bool = False

    @property
    def name(self) -> str:
        return f"{self.category}/{self.kind}[{self.release}/{self.host}/{self.number}]"


KINDS: dict[str, Kind] = {}


def kind(
    category: str, where: Source = hosts.rollout_hosts, *, former_survivor: bool = False, name: str = ""
) -> Callable[[Callable[[Host], Change | Iterator[Change]]], Callable[[Host], Change | Iterator[Change]]]:
    """Register a kind; its docstring says which change of upstream it imitates."""

    def register(make: Callable[[Host], Change | Iterator[Change]]) -> Callable[[Host], Change | Iterator[Change]]:
        called = name or make.__name__.strip("_")
        if called in KINDS:
            raise ValueError(f"two kinds are called {called}")
        summary = (make.__doc__ or "").strip().partition("\n")[0]
        KINDS[called] = Kind(category, called, summary, make, where, former_survivor)
        return make

    return register


def every_kind() -> dict[str, Kind]:
    from tests.mutation import kinds  # noqa: F401

    return KINDS


def of(one: Kind, host: Host) -> Iterator[Mutant]:
    """Yield the mutants of one kind and host that differ from the host."""
    made = one.make(host)
    changes = [made] if made is None or isinstance(made, (str, dict)) else list(made)
    for number, change in enumerate(changes):
        files = {host.path: change} if isinstance(change, str) else change
        if files and files != {host.path: host.text}:
            yield Mutant(one.name, one.category, host.release, host.name, number, files, one.harmless)


@cache
def _hosts(source: Source, release: str) -> tuple[Host, ...]:
    return tuple(source(release))


Site = tuple[Kind, Host]


def sites(releases: Iterable[str] = hosts.RELEASES, categories: str = "", kinds: Iterable[str] = ()) -> list[Site]:
    """Return every kind with every host it is tried on, always in the same order; most of them make mutants."""
    wanted = [
        one
        for one in every_kind().values()
        if (not categories or one.category in categories) and (not kinds or one.name in kinds)
    ]
    return [(one, host) for release in releases for one in wanted for host in _hosts(one.hosts, release)]


def generate(where: Iterable[Site]) -> Iterator[Mutant]:
    """Yield every mutant of these sites, one at a time: all of them together are a gigabyte."""
    for one, host in where:
        yield from of(one, host)


def thinned(where: list[Site], seed: int = 0) -> Iterator[Mutant]:
    """Yield one mutant of each kind and release, on a host and at a place that the seed chooses."""
    yield from _one_of_each(where, random.Random(seed), lambda site: (site[0].name, site[1].release))


def sample(where: list[Site], size: int, seed: int = 0) -> list[Mutant]:
    """Return about `size` mutants: one of each former survivor kind, then of as many others as there is room for."""
    chance = random.Random(seed)
    former = [site for site in where if site[0].former_survivor]
    others = [site for site in where if not site[0].former_survivor]
    chosen = list(_one_of_each(former, chance, lambda site: site[0].name))
    by_category = _one_of_each(others, chance, lambda site: site[0].category)
    chosen += by_category
    names = {mutant.kind for mutant in chosen}
    rest = _one_of_each([site for site in others if site[0].name not in names], chance, lambda site: site[0].name)
    return [*chosen, *itertools.islice(rest, max(size - len(chosen), 0))]


def _small_ones_first(where: list[Site], chance: random.Random) -> list[Site]:
    """Order by size times chance: what is judged in a tenth of the time comes first more often, not always."""
    return sorted(where, key=lambda site: len(site[1].text) * chance.random())


def _one_of_each(where: list[Site], chance: random.Random, key: Callable[[Site], object]) -> Iterator[Mutant]:
    seen: set[object] = set()
    for site in _small_ones_first(chance.sample(where, len(where)), chance):
        made = [] if key(site) in seen else list(of(*site))
        if made:
            seen.add(key(site))
            yield chance.choice(made)
