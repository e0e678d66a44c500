"""The stepping thread: one thread that owns a `vllm.LLM`, steps it, and runs commands between two steps.

Continuous batching: requests are added while others run. Whatever changes the engine (an adapter, weights, sleep, a
cache reset) is a command of the same queue, so that it happens while no step runs, and the requests in flight go on
with the next step: what `pause_generation(mode="keep")` of newer vLLM does, on every vLLM. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.log import logger
from trlpatch.ray.capture import Addition
from trlpatch.ray.messages import EngineHealth, Version

T = TypeVar("T")

_REMEMBERED = 1024


class Steppable(Protocol):
    """`vllm.LLM`'s `llm_engine`, as far as it is stepped."""

    def add_request(self, request_id: str, prompt: Any, params: Any, **kwargs: Any) -> Any:
        """Queue one request; newer releases return the name that they know it by."""

    def step(self) -> Sequence[Any]:
        """Run one step and return the requests that have ended with it."""

    def has_unfinished_requests(self) -> bool:
        """Tell whether a step has something to do."""

    def abort_request(self, request_ids: list[str]) -> None:
        """Drop requests, by the names that they were added with."""


@dataclass(frozen=True)
class Answers:
    """The outputs of one group of prompts, in their order."""

    outputs: list[Any]
    first_version: Version
    last_version: Version
    seconds: float
    tokens: int


class _Group:
    """Prompts that are answered together."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self.key = key
        self.outputs: list[Any] = [None] * size
        self.left = size
        self.first_version = Version()
        self.added_in_update = False
        self.started = time.monotonic()
        self.answer: Future[Answers] = Future()


class Stepper:
    """Builds an engine in a thread of its own and steps it there until `stop`."""

    def __init__(self, build: Callable[[], Any], *, index: int = 0) -> None:
        """Start the thread; `build` returns the `vllm.LLM`, whose `llm_engine` is stepped."""
        self.index = index
        self.version = Version()
        """What the engine samples with; written by commands only."""
        self.asleep = False
        """Commands that put the engine to sleep say so: it is not stepped then."""
        self.built: Future[Any] = Future()
        """The `vllm.LLM` once it is up, or why it is not."""
        self._build = build
        self._commands: deque[tuple[Callable[[Any], Any], Future[Any]]] = deque()
        self._current: Future[Any] | None = None
        """Of the command that runs now."""
        self._wake = threading.Condition()
        self._requests: dict[str, tuple[_Group, int]] = {}
        self._queued: set[_Group] = set()
        self._aborted: deque[str] = deque(maxlen=_REMEMBERED)
        """Keys of groups that were dropped: what arrives of them afterwards is not begun."""
        self._paused = self._stopping = self._updating = False
        self._lost: BaseException | str | None = None
        self._steps = self._tokens = 0
        self._busy_since = time.monotonic()
        self._llm: Any = None
        self._thread = threading.Thread(target=self._run, name=f"engine-{index}", daemon=True)
        self._thread.start()

    # Any thread.

    def generate(self, make: Callable[[Any], Sequence[Addition]], size: int, key: str = "") -> Future[Answers]:
        """Add a group of requests between two steps; the future gives their outputs in order.

        `make(llm)` runs in the stepping thread, gives the `size` requests as the engine is then, and refuses the group
        by raising. `key` is for `abort`.

        Raises:
            EngineLost: the engine answers nothing any more.
        """
        group = _Group(size, key)
        with self._wake:
            self._refuse_lost()
            self._queued.add(group)
        self._command(lambda llm: self._add(llm, make, group))
        return group.answer

    def between_steps(self, command: Callable[[Any], T], *, timeout: float | None = None) -> T:
        """Run `command(llm)` in the stepping thread while no step runs, and return what it returns.

        Requests in flight stay in the engine and go on with the next step.

        Raises:
            EngineLost: the engine answers nothing any more.
            RolloutTimeout: it was not done in `timeout` seconds. What has not begun by then is not run any more.
        """
        if threading.current_thread() is self._thread:
            return command(self._llm)
        done = self._command(command)
        try:
            return done.result(timeout)
        except FutureTimeout:
            if done.done():  # the command's own TimeoutError
                raise
            begun = not done.cancel()
            raise RolloutTimeout(
                f"engine {self.index}: a command {'did not end' if begun else 'had not begun'} after {timeout:g} s; "
                f"{self.health()}"
            ) from None

    def pause(self) -> None:
        """Step no further until `resume`; requests stay where they are, commands still run."""
        self.between_steps(lambda _: self._set_paused(True))

    def resume(self) -> None:
        """Step again."""
        self.between_steps(lambda _: self._set_paused(False))

    def abort(self, key: str | None = None) -> int:
        """Drop the requests of the groups with that key, or all; their futures are cancelled. How many there were."""
        return self.between_steps(lambda llm: self._abort(llm, key))

    def lose(self, reason: BaseException | str) -> None:
        """Answer nothing any more: every request and command, also those under way, raises EngineLost."""
        with self._wake:
            if self._lost is None:
                self._lost = reason
            groups = {group for group, _ in self._requests.values()} | self._queued
            waiting = [future for _, future in self._commands]
            self._requests.clear()
            self._queued.clear()
            self._commands.clear()
            self._wake.notify_all()
            if self._current is not None:
                waiting.append(self._current)
        for future in [*(group.answer for group in groups), *waiting]:
            _settle(future, error=self._as_lost())

    def health(self) -> EngineHealth:
        """Tell how it does, without waiting for a step."""
        with self._wake:
            running = len(self._requests)
            waiting = sum(group.size for group in self._queued)
            since = time.monotonic() - self._busy_since if running or waiting or self._commands else 0.0
        return EngineHealth(
            self.index, self._state(), waiting, running, self.version, self._steps, since, self._tokens,
            "" if self._lost is None else str(self._lost) or repr(self._lost),
        )  # fmt: skip

    def stop(self, timeout: float = 30.0) -> None:
        """End the thread after the step that runs; what is unfinished raises EngineLost."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        self.lose("it was shut down")

    def _state(self) -> str:
        if self._lost is not None:
            return "stopped" if self._stopping else "lost"
        if not self.built.done():
            return "loading"
        return "asleep" if self.asleep else "paused" if self._paused or self._updating else "running"

    def _refuse_lost(self) -> None:
        if self._lost is not None:
            raise self._as_lost()

    def _as_lost(self) -> EngineLost:
        error = EngineLost(
            f"rollout engine {self.index} answers no request any more: {self._lost!s}; it has to be replaced"
        )
        error.__cause__ = self._lost if isinstance(self._lost, BaseException) else None
        return error

    def _command(self, command: Callable[[Any], T]) -> Future[T]:
        done: Future[T] = Future()
        with self._wake:
            self._refuse_lost()
            if not self._commands and not self._requests:
                self._busy_since = time.monotonic()
            self._commands.append((command, done))
            self._wake.notify_all()
        return done

    # The stepping thread.

    def begin_update(self) -> None:
        """Step no further until `end_update`, whatever is resumed: the weights are of no policy."""
        self._updating = True

    def end_update(self, version: Version) -> None:
        """Step again, as `version`; what was added meanwhile is sampled with nothing else."""
        with self._wake:
            for group in {group for group, _ in self._requests.values()}:
                if group.added_in_update:
                    group.first_version, group.added_in_update = version, False
        self.version = version
        self._updating = False

    def _run(self) -> None:
        try:
            self._llm = self._build()
        except BaseException as error:
            self.lose(error)
            self.built.set_exception(error)
            return
        self.built.set_result(self._llm)
        try:
            while self._wait():
                self._run_commands()
                if self._can_step():
                    self._step()
        except BaseException as error:  # of the engine: what it holds is not known any more
            logger.exception("rollout engine %d is lost", self.index)
            self.lose(error)

    def _wait(self) -> bool:
        with self._wake:
            while not (self._stopping or self._lost is not None or self._commands or self._can_step()):
                self._wake.wait()
            return not self._stopping and self._lost is None

    def _can_step(self) -> bool:
        return bool(self._requests) and not (self._paused or self._updating or self.asleep) and self._lost is None

    def _run_commands(self) -> None:
        while True:
            with self._wake:
                if not self._commands or self._lost is not None:
                    return
                command, done = self._commands.popleft()
                if not done.set_running_or_notify_cancel():
                    continue
                self._current = done
            try:
                result = command(self._llm)
            except BaseException as error:
                _settle(done, error=error)
            else:
                _settle(done, result)
            finally:
                self._current = None

    def _step(self) -> None:
        finished = [output for output in self._llm.llm_engine.step() if output.finished]
        self._steps += 1
        ended: list[_Group] = []
        with self._wake:
            self._busy_since = time.monotonic()
            for output in finished:
                group, place = self._requests.pop(output.request_id, (None, 0))
                if group is None:  # aborted meanwhile
                    continue
                group.outputs[place] = output
                group.left -= 1
                self._tokens += tokens_of(output)
                if not group.left:
                    ended.append(group)
        for group in ended:
            self._answer(group)

    def _answer(self, group: _Group) -> None:
        tokens = sum(map(tokens_of, group.outputs))
        seconds = time.monotonic() - group.started
        _settle(group.answer, Answers(group.outputs, group.first_version, self.version, seconds, tokens))

    def _add(self, llm: Any, make: Callable[[Any], Sequence[Addition]], group: _Group) -> None:
        names: list[str] = []
        try:
            if group.key in self._aborted:
                group.answer.cancel()
                return
            group.first_version, group.added_in_update = self.version, self._updating
            for place, addition in enumerate(make(llm)):
                addition.add_to(llm.llm_engine)
                names.append(addition.request_id)
                with self._wake:
                    self._requests[addition.request_id] = group, place
        except BaseException as error:
            self._drop(llm, names)
            _settle(group.answer, error=error)
        finally:
            with self._wake:
                self._queued.discard(group)
        if not group.size:
            self._answer(group)

    def _drop(self, llm: Any, names: list[str]) -> None:
        with self._wake:
            known = {name: self._requests.pop(name, None) for name in names}
        left = [name for name, found in known.items() if found is not None]
        if left:
            llm.llm_engine.abort_request(left)

    def _abort(self, llm: Any, key: str | None) -> int:
        with self._wake:
            names = [name for name, (group, _) in self._requests.items() if key in (None, group.key)]
            groups = {self._requests[name][0] for name in names}
            if key is not None:
                self._aborted.append(key)
        self._drop(llm, names)
        for group in groups:
            group.answer.cancel()
        return len(names)

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused


def tokens_of(output: Any) -> int:
    """Count the tokens that were sampled for one `RequestOutput`, over its completions."""
    return sum(len(completion.token_ids) for completion in getattr(output, "outputs", None) or ())


def _settle(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    """Answer a future that somebody else (`lose`) may have answered before."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
