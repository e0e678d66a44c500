"""Supervision of rollouts: no prompt is lost and none answered twice when an engine on a Ray actor is.

What an engine cannot answer is asked once more, of another engine. One that dies is noticed by its answers; one that
stands still by its health, which is asked while its answers are waited for. Waiting is `ray.wait` over everything at
once, never `ray.get` of a list, which waits for the first before it raises the second's error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trlpatch.errors import RolloutFailed
from trlpatch.log import warn_once
from trlpatch.ray.faults import Fault, fault_of
from trlpatch.ray.fleet import Place
from trlpatch.ray.spread import Group, Spread
from trlpatch.ray.watch import Watch

SLOW = 3.0
"""An engine that takes this many times as long per prompt as the others is said to be slow."""


@dataclass(frozen=True)
class _Flight:
    place: Place
    actor: Any
    group: Any
    key: str | None
    since: float


class Supervisor(Watch):
    """A fleet that is rolled out on and given weights. Several threads may use it at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Fleet`."""
        super().__init__(*args, **kwargs)
        self._unsettled: dict[Any, _Flight] = {}

    def rollout(
        self,
        spread: Spread,
        ask: Callable[[int, Group], Any],
        *,
        key: str | None = None,
        answered: Callable[[Group, Any], None] = lambda group, answer: None,
    ) -> list[tuple[Group, Any]]:
        """Have every group answered once.

        Args:
            spread: holds the groups; engines that serve join it here.
            ask: sends a group to the engine of an index and returns the ref of its answer, without waiting.
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
        return _Rollout(self, spread, ask, key, answered).run()

    def ask(self, send: Callable[[int], Any], *, cost: int = 1, key: str | None = None) -> Any:
        """Have one request answered by the engine that owes the fewest tokens, as `rollout` does; for many threads.

        Args:
            send: sends the request to the engine of an index and returns the ref of its answer.
            cost: its tokens: the prompts', and the most that may be sampled.
            key: of the request.
        """
        alone = Spread([Group((0,), 1, cost)], (), 1)
        ((_, answer),) = self.rollout(alone, lambda index, _: send(index), key=key)
        return answer

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
            for ref, flight in pending.items():
                if self.ended(flight.place, flight.actor) is not None:
                    self._unsettled.pop(ref, None)
            if self.cluster.now() > deadline:
                for ref, flight in list(self._unsettled.items()):
                    what = "the requests of an interrupted rollout were not dropped"
                    self.lose(flight.place, flight.actor, self.late(flight.place, what, "abort"))
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


class _Rollout:
    """One call of `Supervisor.rollout`."""

    def __init__(
        self,
        supervisor: Supervisor,
        spread: Spread,
        ask: Callable[[int, Group], Any],
        key: str | None,
        answered: Callable[[Group, Any], None],
    ) -> None:
        self.supervisor = supervisor
        self.cluster, self.timeouts = supervisor.cluster, supervisor.timeouts
        self.spread, self.ask = spread, ask
        self.key, self.answered = key, answered
        self.serving: dict[int, tuple[Place, Any]] = {}
        """Those that the spread knows, each with the actor that it was then."""
        self.flights: dict[Any, _Flight] = {}
        self.first: dict[Group, Fault] = {}
        """Groups that cost an engine, and how."""
        self.answers: list[tuple[Group, Any]] = []
        self.took: dict[int, float] = {}
        self.sending: tuple[Place, Any] | None = None

    def run(self) -> list[tuple[Group, Any]]:
        try:
            while self.spread.waiting or self.flights:
                self.join()
                self.send()
                self.look_after()
                if not self.flights:  # its engine was exchanged by another thread meanwhile
                    continue
                for ref in self.cluster.wait(self.flights, self.supervisor.slice):
                    if ref in self.flights:
                        self.arrived(ref, self.flights[ref])
        except BaseException:
            if self.sending is not None:  # an interrupt there may have kept from us what was asked
                place, actor = self.sending
                self.flights[self.cluster.call(actor, "abort", self.key)] = _Flight(
                    place, actor, None, self.key, self.cluster.now()
                )
            for flight in self.flights.values():
                flight.place.load -= flight.group.cost if flight.group is not None else 0
            self.supervisor.abandon(self.flights)
            raise
        self.say_slow()
        return sorted(self.answers, key=lambda answer: answer[0].places)

    def join(self) -> None:
        """Let engines that came up meanwhile have their share; while none serves, wait for one."""
        if self.serving and not self.supervisor.degraded:
            return
        # What others still answer is not waited for longer than until there is an engine for the rest.
        places = self.supervisor.revive(wait=not self.flights)
        with self.supervisor.lock:  # another thread may have exchanged one since: its successor serves later
            for index, (place, actor) in list(self.serving.items()):
                if place.actor is not actor or place.state != "serving":
                    self.leave(index)
            for place in places:
                if place.index not in self.serving and place.state == "serving":
                    self.serving[place.index] = place, place.actor
                    self.spread.join(place.index, place.load)

    def send(self) -> None:
        """Give groups to the engines that serve."""
        while (taken := self.spread.take()) is not None:
            index, group = taken
            place, actor = self.serving[index]
            with self.supervisor.lock:  # nobody exchanges the actor between the look at it and the question
                if place.actor is not actor:
                    self.spread.again(index, group)
                    self.leave(index)
                    continue
                self.sending = place, actor
                flight = _Flight(place, actor, group, self.key, self.cluster.now())
                self.flights[self.ask(index, group)] = flight
                self.sending = None
                place.load += group.cost

    def leave(self, index: int) -> None:
        """Give an engine nothing any more."""
        del self.serving[index]
        self.spread.without(index)

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
        flight.place.load -= flight.group.cost
        if fault is not None:
            self.refused(flight, fault)
            return
        self.answers.append((flight.group, answer))
        self.spread.done(flight.place.index, flight.group)
        flight.place.failed_starts = 0
        took = (self.cluster.now() - flight.since) / len(flight.group.places)
        self.took[flight.place.index] = max(took, self.took.get(flight.place.index, 0.0))

    def refused(self, flight: _Flight, fault: Fault) -> None:
        """Raise what the engine says of the request; where somebody else has aborted it, have it asked again, once."""
        if fault.kind != "aborted" or flight.group in self.first:
            raise fault.error
        self.first[flight.group] = fault
        self.spread.again(flight.place.index, flight.group)

    def fell(self, flight: _Flight, fault: Fault) -> None:
        """Lose an engine: whatever it was asked is asked again, once.

        Raises:
            RolloutFailed: some of it was asked again already.
        """
        if fault.kind == "stale":
            self.supervisor.doubt(flight.place, flight.actor, fault)
        else:
            # Where it was lost before (it hung), that says more than that its actor has died.
            fault = self.supervisor.lose(flight.place, flight.actor, fault)
        again: list[Group] = []
        for ref in [ref for ref, other in self.flights.items() if other.actor is flight.actor]:
            again.append(self.flights.pop(ref).group)
            flight.place.load -= again[-1].cost
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
            self.spread.again(flight.place.index, group)
        if self.serving.get(flight.place.index, (None, None))[1] is flight.actor:
            self.leave(flight.place.index)

    def look_after(self) -> None:
        """Lose engines that have had the time that a rollout may take; what a lost one owes is asked of others.

        That its actor was killed is known here. Ray's error for each of its answers comes later, or never: where the
        process is stopped, its node is out of reach, or the word of its death was lost.
        """
        self.supervisor.check()
        now = self.cluster.now()
        for flight in self.flights.values():
            if now - flight.since > self.timeouts.rollout:
                late = self.supervisor.late(flight.place, "its prompts were not answered", "rollout")
                self.supervisor.lose(flight.place, flight.actor, late)
            elif flight.place.idle is not None and flight.actor is flight.place.actor:
                since, until = flight.place.idle
                if until - max(since, flight.since) > self.timeouts.health:
                    what = "it held no request, and had not answered those that it was asked,"
                    late = self.supervisor.late(flight.place, what, "health")
                    self.supervisor.lose(flight.place, flight.actor, late)
        ended = {
            ref: (flight, fault)
            for ref, flight in self.flights.items()
            if (fault := self.supervisor.ended(flight.place, flight.actor)) is not None
        }
        for ref in self.cluster.wait(ended, 0.0) if ended else ():  # its last answers count
            if ref in self.flights:
                self.arrived(ref, self.flights[ref])
        for ref, (flight, fault) in ended.items():
            if ref in self.flights:
                self.fell(flight, fault)

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
