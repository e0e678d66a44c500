"""Ray that does not answer holds a thread, not the user: joining, starting, asking, ending a cluster. Without Ray."""

from __future__ import annotations

import atexit
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from trlpatch.errors import ClusterTimeout
from trlpatch.ray import bounded as module
from trlpatch.ray import cluster
from trlpatch.ray.bounded import bounded
from trlpatch.ray.timeouts import Timeouts

SOON = Timeouts(cluster=0.05)
EVER = Timeouts(cluster=3600)


class HangingRay(ModuleType):
    """Answers nothing until `goes_on` is set, or fails where it was waited for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.goes_on = threading.Event()

    def _hang(self, *_: Any, **__: Any) -> None:
        if not self.goes_on.wait(60.0):
            raise AssertionError("nobody has given up")

    init = shutdown = nodes = _hang

    def is_initialized(self) -> bool:
        return False


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingRay]:
    """In the place of Ray; what hangs ends with the test."""
    made = HangingRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setattr(module, "_calls", None)
    monkeypatch.setattr(cluster, "_started_here", False)
    monkeypatch.setattr(cluster, "_rollout_devices", lambda: None)
    for name in ("RAY_ADDRESS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield made
    signal.signal(signal.SIGTERM, before)
    made.goes_on.set()


def test_a_cluster_that_cannot_be_joined_is_named_with_what_to_do(
    ray: HangingRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ClusterTimeout) as caught:
        cluster.join(limits=SOON)
    said = str(caught.value)
    assert said.startswith("joining the Ray cluster at 10.0.0.1:6379: Ray did not answer in 0.05 s")
    assert said.endswith("timeouts=Timeouts(cluster=0.1) or TRLPATCH_RAY_CLUSTER_TIMEOUT=0.1")
    assert not cluster.started_here()


def test_starting_asking_and_ending_are_bounded_too(
    ray: HangingRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ClusterTimeout, match="starting a Ray cluster on this host"):
        cluster.join(limits=SOON)
    with pytest.raises(ClusterTimeout, match="asking the Ray cluster for its nodes"):
        cluster.nodes(SOON)
    cluster._started_here = True
    left_out: list[Any] = []
    monkeypatch.setattr(atexit, "unregister", left_out.append)
    with caplog.at_level(logging.WARNING):
        cluster.leave(SOON)
    assert "ending the Ray cluster of this process: Ray did not answer in 0.05 s" in caplog.text
    assert left_out == [ray.shutdown], "it would hang once more at the end of the process"


def test_calls_have_one_thread_that_lives_on_and_another_one_after_a_call_that_hangs(ray: HangingRay) -> None:
    def name() -> str:
        return threading.current_thread().name

    def here() -> int:
        return threading.get_ident()

    first = bounded("one", here, EVER)
    assert bounded("two", here, EVER) == first != threading.get_ident()
    assert bounded("three", name, EVER) == "trlpatch-ray-cluster"
    with pytest.raises(ClusterTimeout):
        bounded("four", ray.goes_on.wait, SOON)
    assert bounded("five", here, EVER) not in (first, threading.get_ident())


def test_what_a_call_raises_is_raised_as_itself(ray: HangingRay) -> None:
    def late() -> None:
        raise TimeoutError("of Ray's own")

    with pytest.raises(TimeoutError, match="of Ray's own") as caught:
        bounded("a call", late, EVER)
    assert not isinstance(caught.value, ClusterTimeout)


def test_the_process_still_ends_in_order_on_sigterm_and_ray_does_not_say_otherwise(
    ray: HangingRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("ray._private.worker")

    def init(**_: Any) -> None:
        log.warning("SIGTERM handler is not set because current thread is not the main thread.")
        log.warning("something else")

    monkeypatch.setattr(ray, "init", init)
    cluster.join(limits=EVER)
    assert cluster.started_here()
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler)
    with pytest.raises(SystemExit) as ended:
        handler(signal.SIGTERM, None)
    assert ended.value.code == signal.SIGTERM


def test_resources_that_cannot_be_given_back_are_a_warning(ray: HangingRay, caplog: pytest.LogCaptureFixture) -> None:
    from trlpatch.ray.create import Started
    from trlpatch.ray.plan import Need

    ray.is_initialized = lambda: True  # type: ignore[method-assign]
    ray.util = ModuleType("ray.util")  # type: ignore[attr-defined]
    ray.util.remove_placement_group = ray._hang
    started = Started(ray, Need(1, 1), "group", {}, {}, "auto", "auto", SOON)
    with caplog.at_level(logging.WARNING):
        started.release()
    assert "were not given back: giving resources back: Ray did not answer in 0.05 s" in caplog.text
