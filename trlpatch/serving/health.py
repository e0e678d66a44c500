"""Health: wait until the server answers, say what it is doing meanwhile, and why when it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from trlpatch.errors import ServerFailed
from trlpatch.serving.backends import Launch
from trlpatch.serving.child import Child
from trlpatch.serving.client import status_of

POLL = 0.2


@dataclass(frozen=True)
class Startup:
    """How far a server is: seconds since its start, seconds that it has, the last line of its log."""

    seconds: float
    timeout: float
    line: str


def wait_until_ready(
    child: Child,
    launch: Launch,
    address: str,
    timeout: float,
    on_progress: Callable[[Startup], None] | None = None,
) -> None:
    """Return when the server answers, `on_progress` called about every second until then.

    Raises:
        ServerFailed: the server ended, or did not answer within `timeout` seconds; with what its log says.
    """
    start = time.monotonic()
    told = 0.0
    while True:
        status = child.status()
        if status is not None:
            raise ServerFailed(_failed(child, launch, f"ended with status {status} before it answered"))
        if status_of(address + launch.ready) in (200, 401):
            return
        seconds = time.monotonic() - start
        if seconds > timeout:
            raise ServerFailed(
                _failed(
                    child,
                    launch,
                    f"did not answer at {address} within startup_timeout={timeout:g} seconds (a large model takes "
                    "minutes: --startup-timeout SECONDS)",
                )
            )
        if on_progress is not None and seconds - told >= 1:
            told = seconds
            on_progress(Startup(seconds, timeout, next(iter(child.tail(1)), "")))
        time.sleep(POLL)


def _failed(child: Child, launch: Launch, what: str) -> str:
    errors = child.errors()
    parts = [f"{launch.backend} {what}."]
    if errors:
        parts += ["Its log states:", *(f"  {line}" for line in errors)]
    parts += [f"The end of its log ({child.log}):", *(f"  {line}" for line in child.tail())]
    return "\n".join(parts)
