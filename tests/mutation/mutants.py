"""Mutants, and the registry of kinds: one function per kind, which yields what a host may be changed into."""

from __future__ import annotations

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


def generate(
    releases: Iterable[str] = hosts.RELEASES, categories: str = "", kinds: Iterable[str] = ()
) -> list[Mutant]:
    """Return every mutant of these releases and categories, always in the same order."""
    wanted = [
        one
        for one in every_kind().values()
        if (not categories or one.category in categories) and (not kinds or one.name in kinds)
    ]
    return [m for release in releases for one in wanted for host in _hosts(one.hosts, release) for m in of(one, host)]


def sample(mutants: list[Mutant], size: int, seed: int = 0) -> list[Mutant]:
    """Return about `size` mutants: one of each former survivor kind, the rest spread over the other kinds."""
    chance = random.Random(seed)
    shuffled = chance.sample(mutants, len(mutants))
    first = {mutant.kind: mutant for mutant in reversed(shuffled)}
    survivors = [mutant for name, mutant in first.items() if every_kind()[name].former_survivor]
    others = [mutant for name, mutant in first.items() if not every_kind()[name].former_survivor]
    rest = [mutant for mutant in shuffled if mutant not in survivors and mutant not in others]
    return [*survivors, *others, *rest][: max(size, len(survivors))]


def thinned(mutants: list[Mutant], seed: int = 0) -> list[Mutant]:
    """Return one mutant of each kind and release, on a host and at a site that the seed chooses."""
    chance = random.Random(seed)
    chosen: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in mutants:
        chosen.setdefault((mutant.kind, mutant.release), []).append(mutant)
    return [chance.choice(among) for among in chosen.values()]
