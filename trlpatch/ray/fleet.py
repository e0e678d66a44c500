"""Engines of one kind by their places: which serve, which come up, which are lost; a lost one is replaced.

A place has an index and, at any time, at most one actor. An actor serves once its engine is up *and* has the current
adapter and weights. All that is known of Ray is in `Cluster`, so that decisions are tested without it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from trlpatch.errors import EngineHung, EngineInitFailed, EngineLost, NoEngineLeft
from trlpatch.log import logger
from trlpatch.ray.faults import Fault, fault_of
from trlpatch.ray.timeouts import Timeouts

STARTS = 3
"""How many starts of an engine may fail one after another before its place is given up."""


BESIDE = frozenset({"ready", "health", "abort"})
"""Methods of an actor that are answered beside all others."""


class Cluster(Protocol):
    """What of Ray is used here."""

    def call(self, actor: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of an actor and return the ref of its answer."""

    def wait(self, refs: Iterable[Any], timeout: float) -> list[Any]:
        """Return the refs that are answered, as soon as one is, or none after `timeout` seconds."""

    def get(self, ref: Any) -> Any:
        """Return an answer that is there, or raise what it is."""

    def kill(self, actor: Any) -> None:
        """End an actor's process at once, whatever it does."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""


class RayCluster:
    """`Cluster` by Ray itself."""

    def __init__(self, group: str | None = None) -> None:
        """`group` is the actors' concurrency group for `BESIDE`."""
        self._options = {"concurrency_group": group} if group else {}

    def call(self, actor: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """`actor.<method>.remote`; updates keep the order of the actor's default group."""
        asked = getattr(actor, method)
        if method in BESIDE:
            asked = asked.options(**self._options)
        return asked.remote(*args, **kwargs)

    def wait(self, refs: Iterable[Any], timeout: float) -> list[Any]:
        """`ray.wait` for one, then all that are there."""
        import ray

        asked = list(refs)
        if not asked:
            time.sleep(timeout)
            return []
        # Longer than this Ray takes for a mistake; callers ask again.
        ready, left = ray.wait(asked, num_returns=1, timeout=min(timeout, 3600.0))
        if ready and left:
            ready += ray.wait(left, num_returns=len(left), timeout=0)[0]
        return list(ready)

    def get(self, ref: Any) -> Any:
        """`ray.get`."""
        import ray

        return ray.get(ref)

    def kill(self, actor: Any) -> None:
        """`ray.kill`: SIGKILL follows after five seconds where a process is stopped or stuck (2.60)."""
        import ray

        ray.kill(actor, no_restart=True)

    def now(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()


State = Literal["starting", "stale", "serving", "gone"]


@dataclass(eq=False)
class Place:
    """One of the engines that were asked for, whichever actor it is now."""

    index: int
    actor: Any = None
    """The last one, where the place was given up."""
    info: Any = None
    """What `ready` of the actor said, `EngineInfo`."""
    state: State = "starting"
    ready: Any = None
    """The answer of `ready` that is waited for while it starts."""
    since: float = 0.0
    """When the actor was created."""
    failed_starts: int = 0
    """One after another; an answered request ends the row."""
    lost: tuple[Any, Fault] | None = None
    """The actor before this one, and why it was lost."""
    fault: Fault | None = None
    """What happened here last."""
    replaced: int = 0
    looked_at: float = 0.0
    """When its health was asked for last."""
    idle: tuple[float, float] | None = None
    """Since when, and until when, it has said that it holds no request; None where it last said that it holds some."""
    load: int = 0
    """Tokens that it owes, over all rollouts: prompts, and the most that may be sampled."""


class Fleet:
    """The places of `count` engines, and their replacement."""

    def __init__(
        self,
        build: Callable[[int], Any] | None,
        count: int,
        timeouts: Timeouts | None = None,
        *,
        restore: Callable[[Any, int], bool] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        """Make the places; `start` fills them.

        Args:
            build: creates the actor of an index, without waiting for it. None: what is lost stays lost.
            count: how many engines are wanted.
            timeouts: how long each thing may take.
            restore: gives an actor the current adapter and weights, and waits until it has them; False when nobody
                has them now, and the actor waits for the next publication.
            cluster: stands in for Ray in tests.
        """
        self.places = [Place(index) for index in range(count)]
        self.timeouts = timeouts or Timeouts()
        self.cluster = cluster or RayCluster()
        self.faults: list[Fault] = []
        """Every fault that cost an engine, in order."""
        self.lock = threading.RLock()
        self._build = build
        self.restore = restore or (lambda actor, index: True)
        """See above; may be set once what it needs is there."""
        self._closed = False
        self._said = ""

    # The first start.

    def start(self) -> list[Any]:
        """Create all actors and wait until every engine is up; give what each says of itself.

        Raises:
            EngineInitFailed: one did not come up, or not in `timeouts.init` seconds; all were ended again.
        """
        try:
            for place in self.places:
                self._create(place)
            while starting := self._in("starting"):
                self._wait_for_starts(starting)
                for place in starting:
                    fault = self._started(place)
                    if fault is not None:
                        raise self._init_failed(fault) from fault.error
                    if place.state == "stale":
                        place.state = "serving"
        except BaseException:
            self.shutdown()
            raise
        return [place.info for place in self.places]

    def adopt(self, actors: Sequence[Any], infos: Sequence[Any]) -> None:
        """Take actors whose engines are up already, in place of `start`."""
        for place, actor, info in zip(self.places, actors, infos, strict=True):
            place.actor, place.info, place.state, place.since = actor, info, "serving", self.cluster.now()

    def _init_failed(self, fault: Fault) -> EngineInitFailed:
        hint = {
            "out of memory": "Give it less: gpu_memory_utilization=0.8 or 0.7, a shorter max_model_len.",
            "hung": "A large model takes long to load and compile for the first time; 20 minutes are not unusual. "
            f"{self.timeouts.how_to_raise('init')}.",
        }.get(fault.kind, "The engine's own log is above, and in Ray's session folder; `trlpatch doctor` looks it up.")
        return EngineInitFailed(
            f"starting {len(self.places)} rollout engine(s) on Ray actors: {fault}. All were ended again. {hint}"
        )

    # What serves.

    def serving(self) -> list[Place]:
        """The places whose engine may be asked."""
        return self._in("serving")

    def _in(self, *states: State) -> list[Place]:
        return [place for place in self.places if place.state in states]

    @property
    def degraded(self) -> str:
        """Say in words what is missing; empty when every engine serves."""
        words: dict[State, str] = {
            "starting": "is being replaced",
            "stale": "waits for the current weights",
            "gone": "was shut down"
            if self._closed
            else f"was given up after {STARTS} failed starts"
            if self._build
            else "is lost",
        }
        missing = [place for place in self.places if place.state != "serving"]
        if not missing:
            return ""
        each = "; ".join(
            f"engine {place.index} {words[place.state]}" + (f" ({place.fault})" if place.fault else "")
            for place in missing
        )
        return f"{len(self.places) - len(missing)} of {len(self.places)} rollout engines serve: {each}"

    def _say(self) -> None:
        """Log which engines serve, once per change; that none does once they were shut down is no news."""
        words = self.degraded
        if words == self._said or self._closed:
            return
        if words:
            goes_on = "Rollouts go on with those that serve" if self.serving() else "The next rollout waits for one"
            logger.warning("degraded: %s. %s.", words, goes_on)
        else:
            logger.warning("all %d rollout engines serve again", len(self.places))
        self._said = words

    # Losing and replacing.

    def lose(self, place: Place, actor: Any, fault: Fault) -> Fault:
        """End an actor for good and begin with its replacement; where somebody has done so before, return why."""
        with self.lock:
            if place.lost is not None and place.lost[0] is actor:
                return place.lost[1]
            if place.actor is not actor or self._closed:
                return fault
            place.lost = actor, fault
            self.faults.append(fault)
            place.fault = fault
            if place.state != "serving":
                place.failed_starts += 1
            self._kill(actor)
            place.ready = None
            self._replace(place)
            self._say()
            return fault

    def ended(self, place: Place, actor: Any) -> Fault | None:
        """Say why nothing is to be expected of an actor any more; None while its place has it."""
        with self.lock:
            if place.lost is not None and place.lost[0] is actor:
                return place.lost[1]
            if place.actor is actor and not self._closed:
                return None
            return Fault(place.index, "killed", EngineLost("its actor was replaced, or all engines were shut down"))

    def doubt(self, place: Place, actor: Any, fault: Fault) -> None:
        """Have an engine given the current weights before it is asked again: it answered with others."""
        with self.lock:
            if place.actor is actor and place.state == "serving":
                place.state, place.fault = "stale", fault
                self._say()

    def _replace(self, place: Place) -> None:
        while self._build is not None and place.failed_starts < STARTS:
            try:
                self._create(place)
                place.replaced += 1
                return
            except Exception as error:
                place.failed_starts += 1
                place.fault = fault_of(place.index, error)
                self.faults.append(place.fault)
        place.state = "gone"

    def _create(self, place: Place) -> None:
        assert self._build is not None
        place.actor = self._build(place.index)
        place.state, place.since, place.idle = "starting", self.cluster.now(), None
        place.ready = self.cluster.call(place.actor, "ready")

    def revive(self, *, wait: bool = False) -> list[Place]:
        """Take into service what is up and has got the current weights; return all that serve.

        Args:
            wait: while none serves, wait for one that starts.

        Raises:
            NoEngineLeft: none serves, and none will.
        """
        while True:
            with self.lock:
                for place in self._in("starting"):
                    fault = self._started(place)
                    if fault is not None:
                        self.lose(place, place.actor, fault)
                for place in self._in("stale"):
                    self._refresh(place)
                self._say()
                serving, starting = self.serving(), self._in("starting")
            if serving:
                return serving
            if not starting:
                raise self._none_left()
            if not wait:
                return []
            self._wait_for_starts(starting)

    def _wait_for_starts(self, starting: list[Place]) -> None:
        left = min(place.since for place in starting) + self.timeouts.init - self.cluster.now()
        # A slice at a time: `lose` in another thread exchanges what is waited for.
        self.cluster.wait([place.ready for place in starting if place.ready is not None], min(max(left, 0.0), 5.0))

    def _started(self, place: Place) -> Fault | None:
        """Look whether a starting engine is up, without waiting; a fault when it failed or is overdue."""
        if place.ready is not None and self.cluster.wait([place.ready], 0.0):
            try:
                place.info = self.cluster.get(place.ready)
            except Exception as error:
                fault = fault_of(place.index, error)
                return fault if fault.lost else Fault(place.index, "failed", fault.error)
            place.ready, place.state = None, "stale"
        elif self.cluster.now() - place.since >= self.timeouts.init:
            late = EngineHung(f"not up after {self.timeouts.init:g} s (the timeout `init`)")
            return Fault(place.index, "hung", late)
        return None

    def _refresh(self, place: Place) -> None:
        actor = place.actor
        try:
            current = self.restore(actor, place.index)
        except Exception as error:
            fault = fault_of(place.index, error)
            self.lose(place, actor, fault if fault.lost else Fault(place.index, "failed", fault.error))
            return
        if current and place.actor is actor:
            place.state = "serving"

    def _none_left(self) -> NoEngineLeft:
        waiting = any(place.state == "stale" for place in self.places)
        why = "; ".join(str(place.fault) for place in self.places if place.fault is not None)
        error = NoEngineLeft(
            f"none of {len(self.places)} rollout engines serves: {why or 'they were shut down'}. "
            + (
                "The weights have to be published before the next rollout."
                if waiting
                else f"Each was started anew up to {STARTS} times. Look at the first error; `ray status` says what "
                "the cluster has. Save a checkpoint, and resume with engines that come up."
            )
        )
        error.__cause__ = self.faults[-1].error if self.faults else None
        return error

    # The end.

    def shutdown(self) -> None:
        """Kill every actor. Their replacement ends with it."""
        with self.lock:
            self._closed = True
            for place in self.places:
                if place.actor is not None:
                    self._kill(place.actor)
                place.ready, place.state = None, "gone"

    def _kill(self, actor: Any) -> None:
        try:
            self.cluster.kill(actor)
        except Exception as error:  # it is dead, or the cluster is gone
            logger.debug("killing %r: %s", actor, error)
