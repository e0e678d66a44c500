"""One update of the weights of several engines, of which some may be lost on the way. In the trainer's process."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from trlpatch.errors import EngineAsleep, EngineBusy, EngineLost, WeightsRefused
from trlpatch.log import logger
from trlpatch.ray.transfer.calls import Calls

if TYPE_CHECKING:
    from torch import Tensor

_UNCHANGED = (WeightsRefused, EngineAsleep, EngineBusy)
"""What `start_weight_update` raises with nothing done to the engine."""
_IN_FLIGHT = 2
"""Parts that are in the object store at a time: one is made while the engines load the other."""


class Update:
    """One update of several engines, of which some may be lost on the way."""

    def __init__(self, calls: Calls, live: dict[int, Any], timeout: float) -> None:
        self.live = live
        self.lost: dict[int, BaseException] = {}
        self._calls = calls
        self.timeout = timeout
        self._parts: deque[tuple[Any, dict[int, Any]]] = deque()

    def ask(self, method: str, *args: Any) -> dict[int, Any]:
        """Call all, wait, and return answers and exceptions by index."""
        return self._settle({index: self._calls.ask(handle, method, *args) for index, handle in self.live.items()})

    def ask_each(self, method: str, arguments: dict[int, Any]) -> dict[int, Any]:
        """As `ask`, each with an argument of its own."""
        return self._settle(
            {index: self._calls.ask(handle, method, arguments[index]) for index, handle in self.live.items()}
        )

    def routes(self) -> set[str]:
        """Ask each how it gets weights."""
        answers = self.ask("weight_route")
        self.require(answers)
        found = set(map(str, answers.values()))
        if len(found) > 1:
            raise WeightsRefused(
                f"sending weights: the engines take them in different ways ({', '.join(sorted(found))}); build them "
                "with the same weight_transfer"
            )
        return found

    def begin(self) -> None:
        """Stop all engines; where one refuses, the others go on as they were."""
        refusals = self.ask("weight_refusal")
        self.require(refusals)
        for refusal in refusals.values():
            if refusal is not None:
                raise refusal
        answers = self.ask("start_weight_update")
        unchanged = {index: one for index, one in answers.items() if isinstance(one, _UNCHANGED)}
        self.drop({index: one for index, one in answers.items() if index not in unchanged})
        if unchanged:
            for index in unchanged:
                del self.live[index]
            self.abandon()
            raise next(iter(unchanged.values()))

    def load(self, part: list[tuple[str, Tensor]]) -> None:
        """Give a part to all engines, and wait for the part before."""
        reference = self._calls.put(part)
        request = {"update_info": {"weights": reference}}
        pending = {index: self._calls.ask(one, "update_weights", request) for index, one in self.live.items()}
        self._parts.append((reference, pending))
        while len(self._parts) >= _IN_FLIGHT:
            self._settle_part()

    def finish(self, version: str) -> None:
        """Put the weights to work."""
        while self._parts:
            self._settle_part()
        self.drop(self.ask("finish_weight_update", version))

    def abandon(self) -> None:
        """End the update; engines that it reaches answer nothing until a whole one was sent."""
        while self._parts:
            self._settle_part()
        self.drop(self.ask("abandon_weight_update"))

    def drop(self, answers: dict[int, Any]) -> None:
        """Go on without the engines that failed, and tell them that they are lost: one may answer again later."""
        for index, answer in answers.items():
            if isinstance(answer, BaseException) and index in self.live:
                logger.error("rollout engine %d is lost: sending weights to it failed: %s", index, answer)
                self.lost[index] = answer
                self._calls.ask(self.live.pop(index), "lose", f"an update of its weights failed: {answer}")

    def error(self, version: str) -> EngineLost | None:
        """What to raise for those that are lost; None when none is."""
        if not self.lost:
            return None
        which = ", ".join(f"{index} ({error})" for index, error in self.lost.items())
        have = f"engines {', '.join(map(str, self.live))} have them" if self.live else "no engine is left"
        lost = EngineLost(f"sending weights {version}: lost rollout engines {which}; {have}")
        lost.__cause__ = next(iter(self.lost.values()))
        return lost

    def require(self, answers: dict[int, Any]) -> None:
        """Raise the first exception among answers."""
        for answer in answers.values():
            if isinstance(answer, BaseException):
                raise answer

    def _settle(self, pending: dict[int, Any]) -> dict[int, Any]:
        answers = self._calls.settle(list(pending.values()), self.timeout) if pending else []
        return dict(zip(pending, answers, strict=True))

    def _settle_part(self) -> None:
        _, pending = self._parts.popleft()
        self.drop(self._settle(pending))
