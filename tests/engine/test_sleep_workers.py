"""Sleep of engines whose workers are in other processes, against vLLM's allocator rules of three releases."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.fakes.allocator import RELEASES
from tests.fakes.sleep_rig import ALL, KV, Rig
from trlpatch.engine.memory import cumem
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.sleep import wake
from trlpatch.engine.worker_extension import EXTENSION, KvCacheSleep
from trlpatch.errors import EngineAsleep, EngineWithoutSleep, NotEnoughMemory


@pytest.fixture(params=[*RELEASES, pytest.param("real", marks=pytest.mark.cpu)])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def elsewhere(monkeypatch: pytest.MonkeyPatch, release: str, **settings: Any) -> Rig:
    return Rig(monkeypatch, release, elsewhere=True, **settings)


def test_workers_elsewhere_are_reached_through_the_extension(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    rig = elsewhere(monkeypatch, release, extension=EXTENSION)
    assert rig.state.backend.kv_sleep_unsupported_reason() is None
    rig.device.cached = rig.device.unit
    rig.sleep()
    wake(rig.engine, rig.state, KV_CACHE)
    assert not rig.device.cached, "no worker can empty this process's cache"
    for wake_up in (lambda: wake(rig.engine, rig.state, KV_CACHE), rig.engine.wake_up):
        assert rig.sleep()
        assert rig.mapped() == ALL - KV
        with pytest.raises(EngineAsleep):
            rig.engine.generate(["a"])
        assert not wake(rig.engine, rig.state, WEIGHTS)
        rig.engine.wake_up(tags=["weights"])
        assert rig.mapped() == ALL - KV
        wake_up()
        rig.roll_out()
    rig.sleep()
    rig.device.refuse_after = 1
    with pytest.raises(NotEnoughMemory):
        rig.engine.wake_up()
    assert rig.mapped() == ALL - KV
    rig.device.refuse_after = None
    rig.engine.wake_up()
    rig.state.shared_weights = False
    rig.state.backend.discard_kv_cache()
    rig.engine.sleep(level=1)
    assert rig.mapped() == 0
    rig.engine.wake_up(tags=["weights"])
    assert rig.state.backend.asleep() == {KV_CACHE}
    rig.engine.wake_up(tags=["kv_cache"])
    rig.roll_out()


def test_vllms_own_release_of_the_cache_is_used_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = elsewhere(monkeypatch, "0.28")

    def release_kv_cache_memory() -> None:
        rig.executor.collective_rpc(cumem.discard_kv_cache)
        rig.executor.sleeping_tags, rig.executor.is_sleeping = {KV_CACHE}, True

    rig.engine.release_kv_cache_memory = release_kv_cache_memory  # type: ignore[attr-defined]
    assert rig.sleep()
    assert rig.mapped() == ALL - KV
    assert rig.state.backend.asleep() == {KV_CACHE}
    rig.engine.wake_up()
    assert rig.state.backend.asleep() == set()
    rig.roll_out()


def test_the_allocators_own_discard_is_used_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "0.28")
    asked, discard = [], rig.allocator.discard
    monkeypatch.setattr(rig.allocator, "discard", lambda tags: (asked.append(tags), discard(tags)))
    rig.sleep()
    assert asked == [("kv_cache",)]


def test_an_executor_that_can_discard_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "0.28")
    asked = []

    def discard(tags: tuple[str, ...]) -> None:
        asked.append(tags)
        rig.allocator.discard(tags)
        rig.executor.sleeping_tags, rig.executor.is_sleeping = set(tags), True

    rig.executor.discard = discard  # type: ignore[attr-defined]
    assert rig.state.backend.discard_kv_cache() == KV * rig.device.unit
    assert asked == [("kv_cache",)]
    rig.engine.wake_up()
    rig.roll_out()


def test_workers_that_cannot_be_reached_say_how_they_could(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = elsewhere(monkeypatch, "0.26")
    reason = rig.state.backend.kv_sleep_unsupported_reason()
    assert reason is not None
    assert "worker_extension_cls='trlpatch.engine.worker_extension.KvCacheSleep'" in reason
    assert not rig.sleep(), "shared weights: nothing else is allowed"
    assert rig.mapped() == ALL
    assert rig.state.sleep_method == f"none: {reason}"


@pytest.mark.cpu
def test_the_extension_clashes_with_no_name_of_vllms_worker() -> None:
    pytest.importorskip("vllm")
    from vllm.v1.worker.gpu_worker import Worker

    names = [name for name in dir(KvCacheSleep) if not name.startswith("__")]
    assert names == ["trlpatch_discard_kv_cache", "trlpatch_wake_kv_cache"]
    assert not any(hasattr(Worker, name) for name in names)
    module, _, name = EXTENSION.rpartition(".")
    assert getattr(sys.modules[module], name) is KvCacheSleep


def test_a_worker_without_the_allocator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.device_allocator.cumem", raising=False)
    with pytest.raises(EngineWithoutSleep, match="no CuMemAllocator"):
        cumem.discard_kv_cache(object())
    assert cumem.pool_bytes(KV_CACHE) == 0
    with cumem.whole_wake(None):
        pass
