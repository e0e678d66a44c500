"""KV-only sleep against vLLM's allocator rules of three releases, and against the real CuMemAllocator class.

The driver is a stub in all of them: tests/gpu/sleep_cycles.py does the same on a device.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tests.fakes.allocator import RELEASES, RUNTIME_SIZE
from tests.fakes.sleep_rig import ALL, KV, Rig
from trlpatch.engine import guards
from trlpatch.engine.memory import cumem
from trlpatch.engine.probes import KV_CACHE, WEIGHTS
from trlpatch.engine.sleep import wake
from trlpatch.engine.state import forget, state_of
from trlpatch.errors import EngineAsleep, EngineBusy, NotEnoughMemory, SharedWeights


@pytest.fixture(params=[*RELEASES, pytest.param("real", marks=pytest.mark.cpu)])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, release: str) -> Iterator[Rig]:
    rig = Rig(monkeypatch, release)
    yield rig
    forget(rig.engine)


def test_twenty_cycles_unmap_the_cache_and_only_the_cache(rig: Rig) -> None:
    for _ in range(20):
        assert rig.sleep()
        assert rig.mapped() == ALL - KV
        assert rig.contents(WEIGHTS) == ["weights 0", "weights 1"], "not even for a moment"
        assert rig.executor.sleeping_tags == {KV_CACHE}
        assert rig.executor.is_sleeping
        assert wake(rig.engine, rig.state, KV_CACHE)
        assert rig.mapped() == ALL
        rig.roll_out()
    assert rig.worker.repaired == 20
    assert not rig.executor.is_sleeping


def test_the_bytes_given_back_are_counted_exactly(rig: Rig) -> None:
    assert rig.state.backend.discard_kv_cache() == KV * rig.device.unit
    if hasattr(rig.allocator.pointer_to_data[1000], "is_asleep"):  # below 0.25.1 only the executor knows
        assert cumem.discard_kv_cache(rig.worker) == 0


def test_caches_that_name_the_memory_are_reset_first(rig: Rig) -> None:
    rig.sleep()
    assert rig.engine.llm_engine.resets == ["prefix", "mm", "encoder"]


def test_sleeping_and_waking_twice_is_once(rig: Rig) -> None:
    assert rig.sleep()
    assert not rig.sleep()
    assert not rig.sleep(level=2)
    assert wake(rig.engine, rig.state, KV_CACHE)
    assert not wake(rig.engine, rig.state, KV_CACHE)
    rig.engine.wake_up(tags=["kv_cache"])
    rig.engine.wake_up()
    rig.roll_out()


def test_waking_weights_that_never_slept_maps_nothing(rig: Rig) -> None:
    rig.sleep()
    assert not wake(rig.engine, rig.state, WEIGHTS)
    rig.engine.wake_up(tags=["weights"])  # as TRL does, by hand
    assert rig.mapped() == ALL - KV
    rig.engine.wake_up(tags=["kv_cache"])
    rig.roll_out()


@pytest.mark.parametrize("tags", [None, ["weights", "kv_cache"]])
def test_waking_everything_wakes_what_sleeps(rig: Rig, tags: list[str] | None) -> None:
    rig.sleep()
    rig.engine.wake_up(tags)
    rig.roll_out()
    assert not rig.state.backend.asleep()


def test_a_deeper_sleep_of_shared_weights_raises_and_changes_nothing(rig: Rig) -> None:
    for level in (1, 2):
        with pytest.raises(SharedWeights, match=rf"sleep\(level={level}\).*the trainer's own"):
            rig.engine.sleep(level=level)
    with pytest.raises(SharedWeights):
        rig.engine.sleep()
    assert rig.mapped() == ALL
    rig.engine.sleep(level=0)  # pauses the scheduler only
    rig.roll_out()


@pytest.mark.parametrize("level", [1, 2])
def test_vllms_own_sleep_stays_right_after_a_kv_only_one(rig: Rig, level: int) -> None:
    rig.state.shared_weights = False
    for _ in range(3):
        rig.state.backend.discard_kv_cache()
        rig.engine.wake_up()
        rig.engine.sleep(level=1)
        assert rig.mapped() == 0
        rig.engine.wake_up()
        assert rig.contents(WEIGHTS) == ["weights 0", "weights 1"]
        rig.state.backend.discard_kv_cache()
        rig.engine.sleep(level=level)  # asked of an engine whose cache sleeps, vLLM would keep the weights
        assert rig.mapped() == 0
        assert rig.state.weights_lost == (level == 2)
        rig.engine.wake_up(tags=["weights"])
        rig.engine.wake_up(tags=["kv_cache"])
        assert rig.mapped() == ALL
        if level == 2:
            assert "undefined" in rig.contents(WEIGHTS)
            break
        rig.roll_out()


def test_a_request_for_a_sleeping_engine_raises(rig: Rig) -> None:
    rig.sleep()
    with pytest.raises(EngineAsleep, match=r"kv_cache unmapped.*llm\.wake_up\(\)"):
        rig.engine.generate(["a"])
    rig.state.shared_weights = False
    rig.engine.wake_up()
    rig.engine.sleep(level=1)
    rig.engine.wake_up(tags=["weights"])
    with pytest.raises(EngineAsleep):
        rig.engine.generate(["a"])
    rig.engine.wake_up()
    rig.roll_out()


def test_an_engine_at_work_is_not_put_to_sleep(rig: Rig) -> None:
    rig.engine.llm_engine.unfinished = True
    with pytest.raises(EngineBusy, match="unfinished requests"):
        rig.sleep()
    rig.engine.llm_engine.unfinished = False
    rig.engine.prefix_cache_in_use = True
    with pytest.raises(EngineBusy, match="could not reset its prefix cache"):
        rig.sleep()
    assert rig.mapped() == ALL
    assert not rig.executor.is_sleeping
    rig.roll_out()


def test_too_little_memory_is_said_before_anything_is_mapped(rig: Rig) -> None:
    rig.sleep()
    rig.device.taken = rig.device.free - (KV - 1) * rig.device.unit
    rig.device.attempts = 0
    with pytest.raises(NotEnoughMemory, match=r"waking the engine \(kv_cache\)") as caught:
        wake(rig.engine, rig.state, KV_CACHE)
    assert "gpu_memory_utilization" in str(caught.value)
    assert not rig.device.attempts
    if rig.device.unit == 2**30:
        assert "needs 8.00 GiB of device memory, but 7.00 GiB are free" in str(caught.value)
    assert rig.mapped() == ALL - KV
    assert rig.executor.sleeping_tags == {KV_CACHE}
    rig.device.taken -= rig.device.unit
    wake(rig.engine, rig.state, KV_CACHE)
    rig.roll_out()


def test_torchs_cache_makes_room_only_when_it_has_to(rig: Rig) -> None:
    rig.device.cached = rig.device.unit
    rig.sleep()
    wake(rig.engine, rig.state, KV_CACHE)
    if rig.device.unit == 2**30:  # with units of 4 KiB the spare gigabyte is never there
        assert rig.device.cached
    rig.sleep()
    rig.device.cached = rig.device.free - rig.device.unit
    wake(rig.engine, rig.state, KV_CACHE)
    assert not rig.device.cached
    rig.roll_out()


def test_what_wakes_with_the_weights_is_counted_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "0.32", shared=False)
    weights = ALL - KV + RUNTIME_SIZE
    assert rig.state.backend.weights_bytes() == weights * rig.device.unit
    assert rig.sleep()
    assert rig.mapped() == 0
    rig.device.taken = rig.device.free - (weights - 1) * rig.device.unit
    rig.device.attempts = 0
    with pytest.raises(NotEnoughMemory, match=r"\(weights\) needs 5\.00 GiB of device memory, but 4\.00 GiB are free"):
        wake(rig.engine, rig.state, WEIGHTS)
    assert not rig.device.attempts
    rig.device.taken = 0
    assert wake(rig.engine, rig.state, WEIGHTS)
    assert rig.mapped() == weights
    assert wake(rig.engine, rig.state, KV_CACHE)
    rig.roll_out()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_memory_that_goes_missing_on_the_way_leaves_the_cache_unmapped(rig: Rig, after: int) -> None:
    rig.sleep()
    for _ in range(2):
        rig.device.refuse_after = after
        with pytest.raises(NotEnoughMemory) as caught:
            wake(rig.engine, rig.state, KV_CACHE)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert rig.mapped() == ALL - KV
        assert rig.executor.sleeping_tags == {KV_CACHE}
        with pytest.raises(EngineAsleep):
            rig.engine.generate(["a"])
    rig.device.refuse_after = None
    rig.engine.wake_up()
    rig.roll_out()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failed_wake_from_level_1_can_be_tried_again(rig: Rig, after: int) -> None:
    rig.state.shared_weights = False
    rig.sleep()
    assert rig.mapped() == 0
    rig.device.refuse_after = after
    with pytest.raises(NotEnoughMemory):
        rig.engine.wake_up()
    rig.device.refuse_after = None
    assert rig.contents(KV_CACHE) == ["unmapped"] * 3
    rig.engine.wake_up(tags=["weights"])
    rig.engine.wake_up(tags=["kv_cache"])
    rig.roll_out()
    rig.sleep()
    rig.engine.wake_up()
    rig.roll_out()


def test_a_failed_repair_leaves_the_cache_unmapped(rig: Rig) -> None:
    rig.sleep()
    rig.worker.repair_fails = True
    with pytest.raises(ValueError, match="block tables"):
        wake(rig.engine, rig.state, KV_CACHE)
    assert rig.mapped() == ALL - KV
    rig.worker.repair_fails = False
    wake(rig.engine, rig.state, KV_CACHE)
    rig.roll_out()


def test_the_driver_functions_are_vllms_again_afterwards(rig: Rig) -> None:
    before = rig.module.create_and_map
    rig.sleep()
    wake(rig.engine, rig.state, KV_CACHE)
    rig.sleep()
    rig.device.refuse_after = 0
    with pytest.raises(NotEnoughMemory):
        wake(rig.engine, rig.state, KV_CACHE)
    assert rig.module.create_and_map == before


def test_guards_come_off(rig: Rig) -> None:
    inner = rig.engine.llm_engine
    assert {"add_request", "sleep"} <= vars(inner).keys()
    first = rig.state.guards
    guards.install(rig.engine, rig.state)
    assert rig.state.guards is first
    somebody_elses = lambda *_: None  # noqa: E731
    inner.add_request = somebody_elses  # type: ignore[method-assign]
    forget(rig.engine)
    assert inner.add_request is somebody_elses
    assert "sleep" not in vars(inner)
    assert "wake_up" not in vars(rig.executor)
    rig.engine.sleep(level=1)
    assert rig.mapped() == 0


def test_an_engine_that_trl_built_is_guarded_from_its_first_sleep_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "0.26")
    forget(rig.engine)
    rig.engine.generate(["a"])
    rig.state = state_of(rig.engine)
    rig.state.shared_weights = True
    rig.sleep()
    with pytest.raises(EngineAsleep):
        rig.engine.generate(["a"])


def test_an_engine_that_is_dropped_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "0.26")
    engine = weakref.ref(rig.engine)
    rig.sleep()
    monkeypatch.undo()  # it holds the rig
    del rig
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("kv_only", [False, True])
def test_a_sleep_drains_once(monkeypatch: pytest.MonkeyPatch, kv_only: bool) -> None:
    rig = Rig(monkeypatch, "0.28", shared=False)
    drained: list[int] = []
    drain = rig.state.backend.drain
    monkeypatch.setattr(rig.state.backend, "drain", lambda: (drained.append(1), drain())[1])
    assert rig.sleep(kv_only=kv_only)
    assert len(drained) == 1
    assert not rig.device.busy
