"""Ray in this process: actors are objects, calls run in threads, and what they raise arrives as Ray lets it arrive."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"a traceback\n{cause}")
        self.cause = cause


class RayActorError(RayError):
    pass


class Method:
    def __init__(self, function: Callable[..., Any], handle: Handle) -> None:
        self._function, self._handle = function, handle

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._handle.pool.submit(self._call, args, kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        if self._handle.dead:
            raise RayActorError("The actor died.")
        try:
            return self._function(*[got(one) for one in args], **kwargs)
        except BaseException as error:
            raise RayTaskError(error) from None


class Handle:
    """To an actor that is an object here."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.dead = False
        self.pool = concurrent.futures.ThreadPoolExecutor(16)

    def drain(self) -> None:
        """Wait until every call that was made has ended."""
        before, self.pool = self.pool, concurrent.futures.ThreadPoolExecutor(16)
        before.shutdown(wait=True)

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.actor, name), self)


def got(value: Any) -> Any:
    return value.result() if isinstance(value, concurrent.futures.Future) else value


class FakeRay(ModuleType):
    """As much of `ray` as the trainer's side calls."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = ModuleType("ray.exceptions")
        self.exceptions.__dict__.update(RayError=RayError, RayTaskError=RayTaskError, RayActorError=RayActorError)
        self.killed: list[Handle] = []

    def put(self, value: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(value)
        return future

    def get(self, ref: Any) -> Any:
        return ref.result()

    def wait(self, refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None) -> Any:
        mode = concurrent.futures.ALL_COMPLETED if num_returns == len(refs) else concurrent.futures.FIRST_COMPLETED
        done, _ = concurrent.futures.wait(refs, timeout, mode)
        return [ref for ref in refs if ref in done], [ref for ref in refs if ref not in done]

    def kill(self, handle: Handle) -> None:
        handle.dead = True
        self.killed.append(handle)

    def is_initialized(self) -> bool:
        return True


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """In the place of Ray, installed or not."""
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setitem(sys.modules, "ray.exceptions", made.exceptions)
    return made
