"""One engine of the simulator: continuous batching as processor sharing, from one completion to the next.

All running sequences decode a token in every step, and nothing changes between two completions, so the engine jumps
from one to the next. A step of b sequences with c tokens of context takes `base + each*b + seen*c`; over m steps the
context grows by b each: m*(base + each*b) + seen*(c*m + b*m^2/2) seconds.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from trlpatch.scale.costs import EngineCosts


@dataclass(frozen=True)
class Request:
    """One completion to be made.

    Attributes:
        key: whose it is.
        prompt: tokens of context that it starts with.
        tokens: length of the completion.
        prefill: prompt tokens that have to be computed for it; 0 where another of its group has been.
    """

    key: Hashable
    prompt: int
    tokens: int
    prefill: float


class SimulatedEngine:
    """An engine with so many slots; what does not fit waits in order of arrival."""

    def __init__(self, costs: EngineCosts, slots: int) -> None:
        self._costs, self._slots = costs, slots
        self.clock = 0.0
        """Up to when its state is computed, seconds."""
        self.busy = 0.0
        """Seconds that it had something to decode."""
        self._steps = 0.0
        self._context = 0.0
        self._ends: list[tuple[float, int, Request]] = []
        self._waiting: deque[Request] = deque()
        self._arrived = 0

    @property
    def load(self) -> int:
        """Completions that run or wait."""
        return len(self._ends) + len(self._waiting)

    def submit(self, now: float, request: Request) -> None:
        """Take a request; the engine must have been advanced to `now`."""
        self.clock = max(self.clock, now)
        self._waiting.append(request)
        self._fill()

    def pause(self, now: float, seconds: float) -> None:
        """Decode nothing for so long; what runs goes on afterwards."""
        self.clock = max(self.clock, now) + seconds

    def next_end(self) -> float:
        """Return when the next completion is done, infinity where nothing runs."""
        return self.clock + self._until_end() if self._ends else math.inf

    def advance(self, now: float) -> list[tuple[float, Request]]:
        """Compute until `now`; return what was completed, with the time of each."""
        done = []
        while self._ends and self.next_end() <= now:
            end, seconds = self._ends[0][0], self._until_end()
            self._pass(end - self._steps, seconds)
            self._steps = end
            while (
                self._ends and self._ends[0][0] == end
            ):  # all that end with this step, before others take their slots
                request = heapq.heappop(self._ends)[2]
                self._context -= request.prompt + request.tokens
                done.append((self.clock, request))
            self._fill()
        if self._ends and self.clock < now:
            steps = self._steps_within(now - self.clock)
            self._pass(steps, now - self.clock)
            self._steps += steps
            self.clock = now
        return done

    def drain(self) -> list[tuple[float, Request]]:
        """Compute until everything is done."""
        return self.advance(math.inf)

    def _pass(self, steps: float, seconds: float) -> None:
        self._context += len(self._ends) * steps
        self.clock += seconds
        self.busy += seconds

    def _fill(self) -> None:
        while self._waiting and len(self._ends) < self._slots:
            request = self._waiting.popleft()
            prefill = request.prefill * self._costs.prefill
            self.clock += prefill
            self.busy += prefill
            self._arrived += 1
            heapq.heappush(self._ends, (self._steps + request.tokens, self._arrived, request))
            self._context += request.prompt

    def _until_end(self) -> float:
        return self._seconds(self._ends[0][0] - self._steps)

    def _seconds(self, steps: float) -> float:
        running = len(self._ends)
        return steps * self._costs.step(running, self._context) + self._costs.seen * running * steps**2 / 2

    def _steps_within(self, seconds: float) -> float:
        """Solve `_seconds(steps) == seconds`."""
        running = len(self._ends)
        linear, square = self._costs.step(running, self._context), self._costs.seen * running / 2
        return 2 * seconds / (linear + math.sqrt(linear**2 + 4 * square * seconds))
