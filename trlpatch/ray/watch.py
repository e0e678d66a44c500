"""Watch over engines on Ray actors: whether they step and answer, and calls of all of them at once."""

from __future__ import annotations

from typing import Any

from trlpatch.errors import EngineHung, EngineLost
from trlpatch.ray.faults import Fault, fault_of
from trlpatch.ray.fleet import Fleet, Place

SLICE = 30.0
"""How often, in seconds at most, an engine's health is asked for while its answers are waited for."""


class Watch(Fleet):
    """A fleet whose engines are called, and replaced when they do not answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Fleet`."""
        super().__init__(*args, **kwargs)
        self._health: dict[Any, tuple[Place, Any, float]] = {}
        """Questions that are not answered: of which place and actor, and since when."""

    def everywhere(
        self, method: str, *args: Any, timeout: float | None = None, first: bool = False, **kwargs: Any
    ) -> dict[int, Any]:
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
                    for place in (self.serving()[:1] if first else self._in("serving", "stale"))
                }
            answers, refused = self._collect(calls, method, limit)
            if refused is not None:
                raise refused.error
            if answers:
                return answers
            self.revive(wait=True)
        raise self._none_left()

    def anywhere(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """As `everywhere`, of one engine that serves: what is the same for all."""
        (answer,) = self.everywhere(method, *args, timeout=timeout, first=True, **kwargs).values()
        return answer

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
                    self.lose(place, actor, self.late(place, f"`{method}` was not done", "sync", limit))
                break
        return answers, refused

    def late(self, place: Place, what: str, name: str, limit: float | None = None) -> Fault:
        """The fault of an engine that has had the time of a timeout."""
        limit = self.timeouts[name] if limit is None else limit
        advice = self.timeouts.how_to_raise(name)
        error = EngineHung(f"{what} after {limit:g} s; vLLM may be stuck, it was killed. {advice}")
        return Fault(place.index, "hung", error)

    # Engines that answer nothing.

    @property
    def slice(self) -> float:
        """Seconds between two questions for an engine's health: short timeouts are looked after in time."""
        return min(SLICE, self.timeouts.health / 4, self.timeouts.rollout / 4)

    def check(self) -> None:
        """Lose engines that hang; called, without waiting, by whoever waits for an engine."""
        if not self.lock.acquire(blocking=False):  # somebody replaces or updates engines, and checks afterwards
            return
        try:
            for ref in self.cluster.wait(self._health, 0.0) if self._health else []:
                self._reported(*self._health.pop(ref), ref)
            now = self.cluster.now()
            for ref, (place, actor, sent) in list(self._health.items()):
                if place.actor is not actor:
                    del self._health[ref]
                elif now - sent > self.timeouts.health:
                    del self._health[ref]
                    self.lose(
                        place, actor, self.late(place, "its actor answered nothing, not even `health`,", "health")
                    )
            asked = {id(actor) for _, actor, _ in self._health.values()}
            for place in self.serving():
                if id(place.actor) not in asked and now - place.looked_at >= self.slice:
                    place.looked_at = now
                    self._health[self.cluster.call(place.actor, "health")] = place, place.actor, now
        finally:
            self.lock.release()

    def _reported(self, place: Place, actor: Any, sent: float, ref: Any) -> None:
        """Judge what an engine says of itself; it was asked at `sent`."""
        try:
            health = self.cluster.get(ref)
        except Exception as error:
            fault = fault_of(place.index, error)
            self.lose(place, actor, fault if fault.lost else Fault(place.index, "failed", fault.error))
            return
        if health.state in ("lost", "stopped"):
            self.lose(place, actor, Fault(place.index, "failed", EngineLost(health.reason or health.state)))
            return
        idle = not health.running and not health.waiting
        # Until it was asked: this process may have been stopped since.
        place.idle = (self.cluster.now() if place.idle is None else place.idle[0], sent) if idle else None
        # Paused or asleep it steps not: whoever does that has the timeout `sync` to end it.
        limit = self.timeouts.health + (0.0 if health.state == "running" else self.timeouts.sync)
        if health.seconds_since_step > limit:
            requests = f"{health.running} requests running and {health.waiting} waiting"
            what = f"it was {health.state} with {requests}, and had ended no step"
            self.lose(place, actor, self.late(place, what, "health"))

    def lost(self, index: int, error: BaseException) -> None:
        """Replace an engine that serves and whose actor raised `error`, and wait until the one in its place does.

        Where that one waits for weights that nobody can give now, or was given up, the others are enough.

        Raises:
            NoEngineLeft: there are none.
        """
        place = self.places[index]
        fault = fault_of(index, error)
        with self.lock:
            if place.state == "serving":  # else somebody has replaced it
                self.lose(place, place.actor, fault if fault.lost else Fault(index, "failed", fault.error))
        while place.state != "serving":
            self.revive()
            if place.state in ("gone", "stale"):
                return
            self._wait_for_starts([place])
