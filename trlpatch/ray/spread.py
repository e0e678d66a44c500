"""Spread prompts over engines by load, and put their answers back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

GROUPS_PER_ENGINE = 16
"""Messages that one call sends to an engine at least, where it has so many prompts: what is small is spread evenly."""


@dataclass(frozen=True)
class Group:
    """Prompts that one engine gets in one message."""

    places: tuple[int, ...]
    """Of the prompts in the call."""
    sequences: int
    """Completions, over all prompts."""
    cost: int
    """Tokens: those of the prompts, and the most that may be sampled."""


class Spread:
    """Who gets which prompts of one call.

    A prompt and all completions of it stay together, and so do equal prompts that follow each other (TRL repeats a
    prompt for every completion of a group): the engine's prefix cache computes them once. An engine gets groups while
    it has room for more sequences at a time; then the one with the fewest tokens outstanding gets the next.
    """

    def __init__(self, groups: Sequence[Group], engines: Sequence[int], window: int) -> None:
        """`window` is how many sequences an engine runs at a time (`max_num_seqs`)."""
        self._queue = deque(groups)
        self._tokens = dict.fromkeys(engines, 0)
        self._sequences = dict.fromkeys(engines, 0)
        self._window = window

    @property
    def waiting(self) -> int:
        """Groups that nobody has."""
        return len(self._queue)

    def take(self) -> tuple[int, Group] | None:
        """The next group and the engine to send it to; None when there is none, or no engine has room for it."""
        if not self._queue:
            return None
        needed = self._queue[0].sequences
        free = [
            engine for engine, running in self._sequences.items() if not running or running + needed <= self._window
        ]
        if not free:
            return None
        group = self._queue.popleft()
        engine = min(free, key=lambda engine: (self._tokens[engine], engine))
        self._tokens[engine] += group.cost
        self._sequences[engine] += group.sequences
        return engine, group

    def done(self, engine: int, group: Group) -> None:
        """The engine has answered the group."""
        if engine in self._tokens:
            self._tokens[engine] -= group.cost
            self._sequences[engine] -= group.sequences

    def again(self, engine: int, group: Group) -> None:
        """The engine has not answered the group, nor will it: somebody has to be asked again, before all others."""
        self.done(engine, group)
        self._queue.appendleft(group)

    def without(self, engine: int) -> None:
        """Send this engine nothing any more."""
        self._tokens.pop(engine, None)
        self._sequences.pop(engine, None)


def groups(
    costs: Sequence[int], sequences: Sequence[int], kinds: Sequence[Hashable], engines: int, window: int
) -> list[Group]:
    """Divide prompts into groups: equal ones that follow each other (by `kinds`) together, small ones side by side.

    `costs` are tokens and `sequences` completions, one number a prompt.
    """
    whole = sum(sequences)
    share = -(-whole // max(1, engines))
    """A run that is longer than an engine's share of the call is divided: no engine is to wait for another's."""
    runs: list[list[int]] = []
    length = 0
    for place, kind in enumerate(kinds):
        length += sequences[place]
        if place and kinds[place - 1] == kind and length <= share:
            runs[-1].append(place)
        else:
            runs.append([place])
            length = sequences[place]
    most = max(1, min(window, whole // max(1, engines * GROUPS_PER_ENGINE)))
    made: list[list[int]] = []
    size = 0
    for run in runs:
        more = sum(sequences[place] for place in run)
        if made and size + more <= most:
            made[-1] += run
            size += more
        else:
            made.append(list(run))
            size = more
    return [
        Group(tuple(places), sum(sequences[place] for place in places), sum(costs[place] for place in places))
        for places in made
    ]
