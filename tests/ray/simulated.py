"""A cluster without Ray, in virtual time: actors answer, die and hang when a script says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from trlpatch.ray.messages import EngineHealth, Version
from trlpatch.ray.spread import Group, Spread
from trlpatch.ray.supervision import Supervisor
from trlpatch.ray.timeouts import Timeouts

NEVER = float("inf")


class RayActorError(Exception):
    """Has the name of Ray's."""


class ActorDiedError(RayActorError):
    """The same."""


def dealt(count: int, size: int = 1, room: int = 1000) -> Spread:
    """Prompts in groups of `size`; an engine has `room` of them at a time."""
    places = [tuple(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
    return Spread([Group(some, len(some), len(some)) for some in places], [], room * size)


@dataclass(eq=False)
class Ref:
    method: str
    actor: Actor
    at: float
    """When it is answered."""
    value: Any


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *args: Any, **kwargs: Any) -> Ref:
        return self.actor.called(self.name, *args, **kwargs)


@dataclass(eq=False)
class Actor:
    """An actor that answers `generate` with its prompts times ten, `seconds` after it was asked."""

    cluster: Simulated
    index: int
    seconds: float = 1.0
    starts: float = 5.0
    dies_at: float = NEVER
    """It answers nothing after this time: ActorDiedError, at once."""
    hangs_at: float = NEVER
    """It ends no step after this time."""
    deaf: bool = False
    """While it hangs, not even `health` is answered."""
    state: str = "running"
    replies: dict[str, Any] = field(default_factory=dict)
    """Values, exceptions or functions of the arguments, by method."""
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    refs: list[Ref] = field(default_factory=list)

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self, name)

    def called(self, name: str, *args: Any, **kwargs: Any) -> Ref:
        self.calls.append((name, args))
        now = self.cluster.clock
        delay = {"generate": self.seconds, "ready": self.starts}.get(name, 0.01)
        at = now + delay
        value = self.replies.get(name, f"{name} of {self.index}")
        if name == "generate" and name not in self.replies:
            value = [place * 10 for place in args[0]]
        if callable(value):
            value = value(*args, **kwargs)
        if isinstance(value, Never):
            at = NEVER
        if name == "health":
            busy = any(ref.method == "generate" and ref.at > now for ref in self.refs)
            since = max(0.0, now - self.hangs_at) if busy else 0.0
            value = self.replies.get(name, EngineHealth(self.index, self.state, 0, 1, Version(), 1, since, 1))
            at = NEVER if self.deaf and at > self.hangs_at else at
        elif at > self.hangs_at:
            at = NEVER
        if name == "abort":
            for ref in self.refs:
                if ref.method == "generate" and ref.at > at and at < NEVER:
                    ref.at, ref.value = at, CancelledError()
        ref = Ref(name, self, at, value)
        self.refs.append(ref)
        if self.dies_at < NEVER:
            self.die(self.dies_at)
        return ref

    def die(self, at: float) -> None:
        self.dies_at = at
        for ref in self.refs:
            if ref.at > at:
                ref.at, ref.value = max(at, self.cluster.clock), ActorDiedError(f"engine {self.index} died at {at}")


class CancelledError(Exception):
    """Has the name of concurrent.futures'."""


class Never:
    """A reply that does not come."""


class Simulated:
    """`trlpatch.ray.fleet.Cluster` with a clock of its own; whatever would wait for ever fails."""

    def __init__(self, make: Callable[[Simulated, int, int], Actor] | None = None) -> None:
        self.clock = 0.0
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.make = make or (lambda cluster, index, number: Actor(cluster, index))
        """Makes the actor of an index; `number` counts those of all indices."""
        self.interrupt_at = NEVER
        self.ends = 1e6
        """Who still waits then waits for ever."""
        self.silent = False

    def build(self, index: int) -> Actor:
        self.actors.append(self.make(self, index, len(self.actors)))
        return self.actors[-1]

    def call(self, actor: Actor, method: str, *args: Any, **kwargs: Any) -> Ref:
        return actor.called(method, *args, **kwargs)

    def wait(self, refs: Iterable[Any], timeout: float) -> list[Any]:
        asked = list(refs)
        assert asked or timeout < NEVER, "would wait for ever for nothing"
        soonest = min([ref.at for ref in asked], default=NEVER)
        assert min(soonest, timeout) < NEVER, f"would wait for ever for {asked}"
        until = max(self.clock, min(soonest, self.clock + timeout))
        if until >= self.interrupt_at:
            self.clock, self.interrupt_at = self.interrupt_at, NEVER
            raise KeyboardInterrupt
        assert until < self.ends, "nothing happens for days"
        self.clock = until
        return [ref for ref in asked if ref.at <= self.clock]

    def get(self, ref: Ref) -> Any:
        assert ref.at <= self.clock, "not answered yet"
        if isinstance(ref.value, BaseException):
            raise ref.value
        return ref.value

    def fall_silent(self) -> None:
        """Say nothing from now on of the end of actors that were to be killed."""
        self.silent, self.ends = True, self.clock + 1000

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)
        if not self.silent:
            actor.die(self.clock)

    def now(self) -> float:
        return self.clock


Make = Callable[[Simulated, int, int], Actor]
"""Makes the actor of an index; the last number counts those of all indices."""
FAST = Timeouts(init=100, health=20, sync=10, rollout=math.inf, abort=5)


def supervisor_of(count: int, make: Make | None = None, **more: Any) -> tuple[Supervisor, Simulated]:
    cluster = Simulated(make)
    supervisor = Supervisor(cluster.build, count, more.pop("timeouts", FAST), cluster=cluster, **more)
    supervisor.start()
    return supervisor, cluster


def rolled(supervisor: Supervisor, count: int, **more: Any) -> list[int]:
    """Return every prompt's answer, in order; each must be there once."""
    places: list[int] = []
    values: list[int] = []

    def ask(index: int, group: Group) -> Any:
        return supervisor.places[index].actor.generate.remote(group.places)

    for group, answer in supervisor.rollout(dealt(count, **more), ask):
        places += group.places
        values += answer
    assert places == list(range(count))
    return values


def right(count: int) -> list[int]:
    return [10 * place for place in range(count)]
