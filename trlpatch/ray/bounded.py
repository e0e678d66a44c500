"""Calls of Ray's control plane with a time limit: one that hangs (GCS, a network) holds a thread, and not the user.

Ray's own limits do not cover them: with a GCS that is stopped, `ray.init(address=...)` and `ray.nodes()` wait for its
answer, in C++ that no signal ends (2.60).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from trlpatch.errors import ClusterTimeout
from trlpatch.ray.timeouts import Timeouts

_Calls = SimpleQueue[tuple[Callable[[], Any], Future[Any]]]

_calls: _Calls | None = None
"""Of the thread that takes calls; None where there is none, or the last one has not come back."""


def bounded(what: str, call: Callable[[], Any], limits: Timeouts | None = None) -> Any:
    """Return what `call()` returns, or raise what it raises, within `Timeouts.cluster` seconds.

    Raises:
        ClusterTimeout: it has not returned; it still runs, in a thread that ends with the process.
    """
    global _calls
    timeouts = limits or Timeouts()
    seconds = timeouts["cluster"]
    if _calls is None:
        _calls = SimpleQueue()
        threading.Thread(target=_serve, args=(_calls,), name="trlpatch-ray-cluster", daemon=True).start()
    answer: Future[Any] = Future()
    _calls.put((call, answer))
    try:
        return answer.result(None if math.isinf(seconds) else seconds)
    except BaseException as error:
        if answer.done():
            raise
        _calls = None  # that thread is taken
        if not isinstance(error, TimeoutError):  # an interrupt
            raise
        raise ClusterTimeout(
            f"{what}: Ray did not answer in {seconds:g} s. Its GCS hangs or cannot be reached: `ray status`, and "
            f"gcs_server.out in the session folder of its head, say more. {timeouts.how_to_raise('cluster')}"
        ) from None


def _serve(calls: _Calls) -> None:
    """Take calls for as long as the process lives.

    A thread for each would end the cluster with the first: Ray has the kernel end the daemons of `ray.init` when the
    thread that has started them ends (PR_SET_PDEATHSIG).
    """
    while True:
        call, answer = calls.get()
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)
        del call, answer
