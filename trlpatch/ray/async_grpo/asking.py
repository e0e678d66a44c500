"""Ask one engine for the completions of one prompt: the one with the least to do, and another if it is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.async_grpo.protocols import AsyncEngines
from trlpatch.ray.calls import own_error
from trlpatch.ray.messages import RolloutRequest, RolloutResponse

_LOOK = 1.0
"""Seconds between two looks at the engines' health while an answer is waited for."""


class Asker:
    """Spreads requests over the engines, for threads that each wait for one."""

    def __init__(self, engines: AsyncEngines) -> None:
        """Nothing is asked yet."""
        self._engines = engines
        self._lock = threading.Lock()
        self._repair = threading.Lock()
        self._load = [0] * len(engines.handles)

    def ask(self, request: RolloutRequest) -> RolloutResponse:
        """Wait for the answer of one engine. What a lost one has not answered is asked again, once.

        Raises:
            EngineLost: the engine is lost and cannot be replaced, or a second one is lost over this request.
            RolloutTimeout: it took longer than `timeouts.rollout`.
            Whatever vLLM says of the prompt.
        """
        answer = self._asked(request)
        if isinstance(answer, EngineLost):
            answer = self._asked(request)
        if isinstance(answer, BaseException):
            raise answer
        response: RolloutResponse = answer
        return response

    def _asked(self, request: RolloutRequest) -> Any:
        """The response, or what was raised; an engine that is lost was replaced then."""
        with self._lock:
            index = min(range(len(self._load)), key=self._load.__getitem__)
            self._load[index] += 1
            handle = self._engines.handles[index]
        try:
            answer = self._answer(index, request)
        finally:
            with self._lock:
                self._load[index] -= 1
        if isinstance(answer, EngineLost):
            with self._repair:  # every thread that it owes an answer comes here
                if self._engines.handles[index] is handle:
                    self._engines.replaced(answer, index)
        return answer

    def _answer(self, index: int, request: RolloutRequest) -> Any:
        import ray

        limit = self._engines.timeouts.rollout
        deadline = None if limit is None else time.monotonic() + limit
        try:
            ref = self._engines.submit(index, request)
        except Exception as error:
            return own_error(error, index, "generate")
        while not ray.wait([ref], timeout=_LOOK)[0]:
            self._engines.supervisor.check()
            if deadline is not None and time.monotonic() > deadline:
                raise RolloutTimeout(
                    f"rollout engine {index}: a prompt was not answered in {limit:g} s (timeouts.rollout)"
                )
        try:
            return ray.get(ref)
        except Exception as error:
            return own_error(error, index, "generate")
