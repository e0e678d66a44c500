"""Supervision of rollouts: no prompt is lost and none answered twice when an engine on a Ray actor is.

What an engine cannot answer is asked once more, of another engine. One that dies is noticed by its answers; one that
stands still by its health, which is asked while its answers are waited for. Waiting is `ray.wait` over everything at
once, never `ray.get` of a list, which waits for the first before it raises the second's error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from trlpatch.errors import EngineHung, EngineLost, RolloutFailed
from trlpatch.log import warn_once
from trlpatch.ray.faults import Fault, fault_of
from trlpatch.ray.fleet import Fleet, Place


class Group(Protocol):
    """Prompts that one engine gets in one message; hashable."""

    @property
    def places(self) -> tuple[int, ...]:
        """Of the prompts in the call."""


G = TypeVar("G", bound=Group)


class Deal(Protocol[G]):
    """Who gets which group: `trlpatch.ray.spread.Spread`."""

    @property
    def waiting(self) -> int:
        """Groups that nobody has."""

    def take(self) -> tuple[int, G] | None:
        """The next group and its engine; None when there is none, or no engine has room."""

    def done(self, engine: int, group: G) -> None:
        """The engine has answered the group."""

    def again(self, engine: int, group: G) -> None:
        """The engine will not answer the group: another has to."""

    def join(self, engine: int) -> None:
        """Send this engine groups, too; nothing where it has some."""

    def without(self, engine: int) -> None:
        """Send this engine nothing any more."""


SLICE = 30.0
"""How often, in seconds at most, an engine's health is asked for while its answers are waited for."""
SLOW = 3.0
"""An engine that takes this many times as long per prompt as the others is said to be slow."""


@dataclass(frozen=True)
class _Flight:
    place: Place
    actor: Any
    group: Any
    key: str | None
    since: float


class Supervisor(Fleet):
    """A fleet that is rolled out on and given weights. Several threads may use it at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Fleet`."""
        super().__init__(*args, **kwargs)
        self._unsettled: dict[Any, _Flight] = {}

    def rollout(
        self,
        deal: Deal[G],
        ask: Callable[[Any, G], Any],
        *,
        key: str | None = None,
        answered: Callable[[G, Any], None] = lambda group, answer: None,
    ) -> list[tuple[G, Any]]:
        """Have every group answered once.

        Args:
            deal: holds the groups; engines that serve join it here.
            ask: sends a group to an actor and returns the ref of its answer, without waiting.
            key: of the requests, for `abort` of the actor; None aborts whatever the engine has.
            answered: is told of each answer. A WrongVersion that it raises is the engine's fault: it is given the
                current weights and the group is asked again.

        Returns:
            groups and the actors' answers, in the order of the groups' first prompts.

        Raises:
            RolloutFailed: some prompts cost two engines, with the errors of both.
            NoEngineLeft: no engine serves, and none will.
            Whatever else an engine raised about its prompts (a ValueError of vLLM's): asking again would not help.

        Whatever is raised, also a KeyboardInterrupt: requests in flight are aborted first.
        """
        self.settle()
        return _Rollout(self, deal, ask, key, answered).run()

    def everywhere(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> dict[int, Any]:
        """Call a method of every actor that serves or waits for weights, at once; give the answers by engine.

        An engine that dies of it, or has not answered in time, is lost and replaced; the others' answers count.

        Raises:
            NoEngineLeft: no engine answered, and none will.
            Whatever else an actor raised, once all have answered.
        """
        limit = self.timeouts.sync if timeout is None else timeout
        for _ in range(2):
            with self.lock:
                calls = {
                    self.cluster.call(place.actor, method, *args, **kwargs): (place, place.actor)
                    for place in self._in("serving", "stale")
                }
            answers, refused = self._collect(calls, method, limit)
            if refused is not None:
                raise refused.error
            if answers:
                return answers
            self.revive(wait=True)
        raise self._none_left()

    def publish(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> dict[int, Any]:
        """As `everywhere`, with what makes an adapter or weights current: who has answered serves from now on.

        What `restore` gives must be these already: an engine that comes up meanwhile gets them from there.
        """
        with self.lock:
            answers = self.everywhere(method, *args, timeout=timeout, **kwargs)
            for place in self._in("stale"):
                if place.index in answers:
                    place.state = "serving"
            self._say()
        return answers

    def _collect(
        self, calls: dict[Any, tuple[Place, Any]], method: str, limit: float
    ) -> tuple[dict[int, Any], Fault | None]:
        answers: dict[int, Any] = {}
        refused: Fault | None = None
        deadline = self.cluster.now() + limit
        while calls:
            for ref in self.cluster.wait(calls, max(0.0, min(SLICE, deadline - self.cluster.now()))):
                place, actor = calls.pop(ref)
                try:
                    answers[place.index] = self.cluster.get(ref)
                except Exception as error:
                    fault = fault_of(place.index, error)
                    if fault.lost:
                        self.lose(place, actor, fault)
                    else:
                        refused = refused or fault
            if calls and self.cluster.now() >= deadline:
                for place, actor in calls.values():
                    self.lose(place, actor, self._late(place, f"`{method}` was not done", limit, "sync"))
                break
        return answers, refused

    def _late(self, place: Place, what: str, limit: float, name: str) -> Fault:
        advice = self.timeouts.how_to_raise(name)
        error = EngineHung(f"{what} after {limit:g} s; vLLM may be stuck, it was killed. {advice}")
        return Fault(place.index, "hung", error)

    # Requests that nobody waits for any more.

    def abandon(self, flights: dict[Any, _Flight]) -> None:
        """Have requests in flight dropped, so that the next rollout is alone on its engines."""
        with self.lock:
            self._unsettled.update(flights)  # before anything that a second interrupt could end
        self.settle()

    def settle(self) -> None:
        """Wait until what was abandoned is gone from its engines; an engine that cannot drop it is replaced.

        `abort` is sent again until every answer has come: a request may reach a threaded actor after it.
        """
        deadline = self.cluster.now() + self.timeouts.abort
        aborts: dict[Any, Any] = {}
        while self._unsettled:
            pending = dict(self._unsettled)
            for flight in pending.values():
                if (flight.actor, flight.key) not in aborts.values():
                    aborts[self.cluster.call(flight.actor, "abort", flight.key)] = flight.actor, flight.key
            self.cluster.wait(pending, 0.2)
            for ref in self.cluster.wait([*pending, *aborts], 0.0):
                aborts.pop(ref, None)
                flight = pending.get(ref)
                if flight is not None:
                    self._settled(ref, flight)
            if self.cluster.now() > deadline:
                for ref, flight in list(self._unsettled.items()):
                    what = "the requests of an interrupted rollout were not dropped"
                    self.lose(flight.place, flight.actor, self._late(flight.place, what, self.timeouts.abort, "abort"))
                    self._unsettled.pop(ref, None)

    def _settled(self, ref: Any, flight: _Flight) -> None:
        try:
            self.cluster.get(ref)
        except Exception as error:
            fault = fault_of(flight.place.index, error)
            if fault.lost and fault.kind != "stale":
                self.lose(flight.place, flight.actor, fault)
        self._unsettled.pop(ref, None)

    def shutdown(self) -> None:
        """Kill every actor; what is in flight is not waited for."""
        super().shutdown()
        self._unsettled.clear()


class _Rollout(Generic[G]):
    """One call of `Supervisor.rollout`."""

    def __init__(
        self,
        supervisor: Supervisor,
        deal: Deal[G],
        ask: Callable[[Any, G], Any],
        key: str | None,
        answered: Callable[[G, Any], None],
    ) -> None:
        self.supervisor = supervisor
        self.cluster, self.timeouts = supervisor.cluster, supervisor.timeouts
        self.deal, self.ask = deal, ask
        self.key, self.answered = key, answered
        self.serving: dict[int, tuple[Place, Any]] = {}
        """Those that the deal knows, each with the actor that it was then."""
        self.flights: dict[Any, _Flight] = {}
        self.health: dict[Any, tuple[Place, Any, float]] = {}
        self.asked_at: dict[int, float] = {}
        self.first: dict[G, Fault] = {}
        """Groups that cost an engine, and how."""
        self.answers: list[tuple[G, Any]] = []
        self.took: dict[int, float] = {}
        self.sending: tuple[Place, Any] | None = None

    def run(self) -> list[tuple[G, Any]]:
        try:
            while self.deal.waiting or self.flights:
                self.join()
                self.send()
                self.look_after()
                for ref in self.cluster.wait([*self.flights, *self.health], self.slice):
                    if ref in self.flights:
                        self.arrived(ref, self.flights[ref])
                    elif ref in self.health:
                        self.reported(ref)
        except BaseException:
            if self.sending is not None:  # an interrupt there may have kept from us what was asked
                place, actor = self.sending
                self.flights[self.cluster.call(actor, "abort", self.key)] = _Flight(
                    place, actor, None, self.key, self.cluster.now()
                )
            self.supervisor.abandon(self.flights)
            raise
        self.say_slow()
        return sorted(self.answers, key=lambda answer: answer[0].places)

    @property
    def slice(self) -> float:
        """How long to wait at a time, in seconds: short timeouts are looked after in time."""
        return min(SLICE, self.timeouts.health / 4, self.timeouts.rollout / 4)

    def join(self) -> None:
        """Let engines that came up meanwhile have their share; while none serves, wait for one."""
        if self.serving and not self.supervisor.degraded:
            return
        # What others still answer is not waited for longer than until there is an engine for the rest.
        places = self.supervisor.revive(wait=not self.flights)
        for index, (place, actor) in list(self.serving.items()):
            if place.actor is not actor or place.state != "serving":  # seen by another thread, or by `everywhere`
                self.deal.without(index)
                del self.serving[index]
        for place in places:
            # One that this rollout has doubted or replaced while it owes answers is back when they are accounted for.
            if place.index not in self.serving and place.actor is not None:
                self.serving[place.index] = place, place.actor
                self.deal.join(place.index)

    def send(self) -> None:
        """Give groups to the engines that serve."""
        while (taken := self.deal.take()) is not None:
            index, group = taken
            place, actor = self.sending = self.serving[index]
            flight = _Flight(place, actor, group, self.key, self.cluster.now())
            self.flights[self.ask(actor, group)] = flight
            self.sending = None

    def arrived(self, ref: Any, flight: _Flight) -> None:
        """Take an answer, or what it says of its engine."""
        fault = None
        try:
            answer = self.cluster.get(ref)
            self.answered(flight.group, answer)
        except Exception as error:
            fault = fault_of(flight.place.index, error)
        if fault is not None and fault.lost:
            self.fell(flight, fault)
            return
        del self.flights[ref]
        if fault is not None:
            self.refused(flight, fault)
            return
        self.answers.append((flight.group, answer))
        self.deal.done(flight.place.index, flight.group)
        flight.place.failed_starts = 0
        took = (self.cluster.now() - flight.since) / len(flight.group.places)
        self.took[flight.place.index] = max(took, self.took.get(flight.place.index, 0.0))

    def refused(self, flight: _Flight, fault: Fault) -> None:
        """Raise what the engine says of the request; where somebody else has aborted it, have it asked again, once."""
        if fault.kind != "aborted" or flight.group in self.first:
            raise fault.error
        self.first[flight.group] = fault
        self.deal.again(flight.place.index, flight.group)

    def fell(self, flight: _Flight, fault: Fault) -> None:
        """Lose an engine: whatever it was asked is asked again, once.

        Raises:
            RolloutFailed: some of it was asked again already.
        """
        if fault.kind == "stale":
            self.supervisor.doubt(flight.place, flight.actor, fault)
        else:
            self.supervisor.lose(flight.place, flight.actor, fault)
        again: list[G] = []
        for ref in [ref for ref, other in self.flights.items() if other.actor is flight.actor]:
            again.append(self.flights.pop(ref).group)
        self.health = {ref: asked for ref, asked in self.health.items() if asked[1] is not flight.actor}
        twice = [group for group in again if group in self.first]
        if twice:
            first = self.first[twice[0]]
            places = sorted(place for group in twice for place in group.places)
            raise RolloutFailed(
                f"{len(places)} of the prompts of this rollout (the first is number {places[0]}) were given to two "
                f"rollout engines, and both were lost: first {first}; then {fault}. They were not asked a third time: "
                "a prompt that ends engines would end them all. Look at these prompts, and at what is in the engines' "
                "memory and logs",
                first.error,
                fault.error,
            )
        self.first.update(dict.fromkeys(again, fault))
        for group in sorted(again, key=lambda group: group.places, reverse=True):
            self.deal.again(flight.place.index, group)
        if self.serving.get(flight.place.index, (None, None))[1] is flight.actor:
            del self.serving[flight.place.index]
            self.deal.without(flight.place.index)

    # Engines that answer nothing.

    def look_after(self) -> None:
        """Ask engines that owe answers how they do, and lose those that are overdue."""
        now = self.cluster.now()
        waited_for = {id(flight.actor): flight for flight in self.flights.values()}
        for flight in self.flights.values():
            if now - flight.since > self.timeouts.rollout:
                self.overdue(flight, "its prompts were not answered", "rollout")
                return
        for ref, (_, actor, sent) in list(self.health.items()):
            if id(actor) not in waited_for:
                del self.health[ref]
            elif now - sent > self.timeouts.health:
                self.overdue(waited_for[id(actor)], "its actor answers nothing, not even `health`,", "health")
                return
        busy = {id(actor) for _, actor, _ in self.health.values()}
        for key, flight in waited_for.items():
            if key not in busy and now - self.asked_at.get(key, flight.since) >= self.slice:
                self.asked_at[key] = now
                self.health[self.cluster.call(flight.actor, "health")] = flight.place, flight.actor, now

    def overdue(self, flight: _Flight, what: str, name: str) -> None:
        self.fell(flight, self.supervisor._late(flight.place, what, self.timeouts[name], name))

    def reported(self, ref: Any) -> None:
        """Judge what an engine says of itself."""
        place, actor, _ = self.health.pop(ref)
        flight = next((one for one in self.flights.values() if one.actor is actor), None)
        if flight is None:
            return
        try:
            health = self.cluster.get(ref)
        except Exception as error:
            fault = fault_of(place.index, error)
            self.fell(flight, fault if fault.lost else Fault(place.index, "failed", fault.error))
            return
        if health.state in ("lost", "stopped"):
            self.fell(flight, Fault(place.index, "failed", EngineLost(health.reason or health.state)))
            return
        # Paused or asleep it steps not: whoever does that has the timeout `sync` to end it.
        limit = self.timeouts.health + (0.0 if health.state == "running" else self.timeouts.sync)
        if health.seconds_since_step > limit:
            requests = f"{health.running} requests running and {health.waiting} waiting"
            what = f"it is {health.state} with {requests}, and had ended no step"
            self.overdue(flight, what, "health")

    def say_slow(self) -> None:
        """Warn of engines that took much longer for a prompt than the fastest one."""
        if len(self.took) < 2:
            return
        fastest = min(self.took.values())
        for index, seconds in self.took.items():
            if seconds > SLOW * fastest and seconds > 1.0:
                warn_once(
                    self.supervisor,
                    f"rollout engine {index} is slow: {seconds:.1f} s a prompt, the fastest {fastest:.1f} s. It "
                    "steps, so it is kept and given fewer prompts; look at what else runs on its GPU and node.",
                )
