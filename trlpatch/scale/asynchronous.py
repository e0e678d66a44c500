"""An asynchronous run, event by event: engines that never stop, a trainer, and a bound on staleness.

What is in flight or done and not yet trained on never exceeds `max_staleness` batches, one more while the trainer
waits: in order of completion nothing is then older than the bound. A completion that others overtake can be; its group
is dropped when the trainer comes to it, and another is started. With a bound of 0 this is the synchronous step.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from trlpatch.scale.costs import Costs
from trlpatch.scale.prediction import Prediction, training_s
from trlpatch.scale.simulated_engine import Request, SimulatedEngine


@dataclass
class _Group:
    """Completions of one prompt."""

    version: int
    lengths: list[int]
    missing: int


@dataclass
class _Counted:
    """What is counted once the run has warmed up."""

    training_s: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    tokens: int = 0
    dropped: int = 0


class AsynchronousRun:
    """See the module. Times are seconds since the start."""

    def __init__(self, costs: Costs, generator: random.Random) -> None:
        setting = costs.setting
        self._costs, self._setting, self._random = costs, setting, generator
        # Beyond one group an engine none of them would ever have work.
        groups = setting.completions // setting.generations
        most = min(setting.engines, (setting.max_staleness + 1) * groups)
        self._engines = [SimulatedEngine(costs.engine, setting.slots) for _ in range(most)]
        self._ends: list[tuple[float, int, int]] = []
        self._changes = [0] * most
        self._loads = [(0, at) for at in range(most)]
        self._done: deque[_Group] = deque()
        self._pending = 0
        self._version = 0
        self._counted = _Counted()
        self._looked = (0, 0)
        """(version, groups done) at the last look for stale ones."""

    def run(self, warmup: int, steps: int) -> Prediction:
        """Simulate; what happens in the first `warmup` steps is not counted."""
        setting, now, busy, started = self._setting, 0.0, 0.0, 0.0
        for step in range(warmup + steps):
            if step == warmup:
                self._counted = _Counted()
                started, busy = now, sum(engine.busy for engine in self._engines)
            now, batch = self._wait(now)
            self._start(now, setting.max_staleness * setting.completions)
            training = training_s(self._costs, [length for group in batch for length in group.lengths])
            self._counted.training_s.append(training)
            now += training + self._costs.sync
            self._until(now - self._costs.pause)
            for at, engine in enumerate(self._engines):
                engine.pause(now - self._costs.pause, self._costs.pause)
                self._changed(at)
            self._until(now)
            self._version += 1
        counted, elapsed = self._counted, now - started
        busy = sum(engine.busy for engine in self._engines) - busy
        groups = len(counted.staleness)
        return Prediction(
            step_s=elapsed / steps, generation_s=busy / steps / len(self._engines),
            training_s=fmean(counted.training_s), sync_s=self._costs.sync, tokens_per_s=counted.tokens / elapsed,
            engines_busy=busy / (setting.engines * elapsed), trainer_busy=sum(counted.training_s) / elapsed,
            staleness=fmean(counted.staleness), dropped=counted.dropped / (groups + counted.dropped),
        )  # fmt: skip

    def _wait(self, now: float) -> tuple[float, list[_Group]]:
        """Let the engines work until a batch is there; return when, and the batch."""
        setting = self._setting
        groups = setting.completions // setting.generations
        while True:
            self._drop_stale()
            if len(self._done) >= groups:
                batch = [self._done.popleft() for _ in range(groups)]
                self._pending -= setting.completions
                self._counted.staleness += [self._version - group.version for group in batch]
                self._counted.tokens += sum(length for group in batch for length in group.lengths)
                return now, batch
            self._start(now, (setting.max_staleness + 1) * setting.completions)
            now = self._next(now)

    def _drop_stale(self) -> None:
        """Drop what the trainer may not use any more."""
        if self._looked == (self._version, len(self._done)):
            return
        oldest = self._version - self._setting.max_staleness
        young = deque(group for group in self._done if group.version >= oldest)
        dropped = len(self._done) - len(young)
        self._done = young
        self._pending -= dropped * self._setting.generations
        self._counted.dropped += dropped
        self._looked = (self._version, len(young))

    def _start(self, now: float, most: int) -> None:
        """Ask for groups of prompts until `most` completions are on their way or waiting."""
        setting = self._setting
        while self._pending + setting.generations <= most:
            lengths = [setting.lengths.sample(self._random) for _ in range(setting.generations)]
            group = _Group(self._version, lengths, setting.generations)
            self._pending += setting.generations
            at = self._least_loaded()
            engine = self._engines[at]
            self._collect(engine.advance(now))
            prefill = setting.prompt_tokens / setting.generations
            for length in lengths:
                engine.submit(now, Request(_Key(group), setting.prompt_tokens, length, prefill))
            self._changed(at)

    def _least_loaded(self) -> int:
        while True:
            load, at = self._loads[0]
            if load == self._engines[at].load:
                return at
            heapq.heappop(self._loads)  # `_changed` has put a newer one beside it

    def _changed(self, at: int) -> None:
        """Note when the engine's next completion is due now; earlier notes are void."""
        self._changes[at] += 1
        engine = self._engines[at]
        if engine.load:
            heapq.heappush(self._ends, (engine.next_end(), at, self._changes[at]))
        heapq.heappush(self._loads, (engine.load, at))

    def _next(self, now: float) -> float:
        """Go to the next completion of any engine; return its time."""
        while True:
            when, at, change = heapq.heappop(self._ends)
            if change == self._changes[at]:
                break
        self._collect(self._engines[at].advance(when))
        self._changed(at)
        return max(now, when)

    def _until(self, end: float) -> None:
        """Let the engines work until `end`, while the trainer is busy: nothing is asked for."""
        while self._ends and self._ends[0][0] <= end:
            when, at, change = heapq.heappop(self._ends)
            if change == self._changes[at]:
                self._collect(self._engines[at].advance(when))
                self._changed(at)
        for at, engine in enumerate(self._engines):
            self._collect(engine.advance(end))
            self._changed(at)

    def _collect(self, done: list[tuple[float, Request]]) -> None:
        for _, request in done:
            assert isinstance(request.key, _Key)
            group = request.key.group
            group.missing -= 1
            if not group.missing:
                self._done.append(group)


class _Key:
    """A group as the key of its requests, compared by identity."""

    __slots__ = ("group",)

    def __init__(self, group: _Group) -> None:
        self.group = group
