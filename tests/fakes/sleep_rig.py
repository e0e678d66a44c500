"""An engine over the stubs of one release, or over the real CuMemAllocator class, put together for a test."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.fakes.allocator import LAYOUT, DeviceStub, ExecutorStub, SleepyEngineStub, WorkerStub, cumem_stub
from trlpatch.engine import guards
from trlpatch.engine.memory import device
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS, WEIGHTS
from trlpatch.engine.sleep import put_to_sleep
from trlpatch.engine.state import state_of
from trlpatch.engine.worker_extension import KvCacheSleep

KV, ALL = sum(LAYOUT[KV_CACHE]), sum(map(sum, LAYOUT.values()))


class Rig:
    """An engine over the stubs, and its state; `unit` bytes are one unit of LAYOUT."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, release: str, *, shared: bool = True, **settings: Any) -> None:
        self.release = release
        if release == "real":
            self.device = DeviceStub(unit=4096)
            module = real_module(monkeypatch, self.device)
        else:
            self.device = DeviceStub()
            module = cumem_stub(release, self.device)
        monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
        if release != "real":
            package = ModuleType("vllm.device_allocator")
            if release == "0.32":
                package.DEFERRABLE_TAGS = tuple(sorted(SLEEP_TAGS))  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setattr(device, "synchronize", self.device.synchronize)
        monkeypatch.setattr(device, "free_bytes", lambda where=None: self.device.free)
        monkeypatch.setattr(device, "free_up", self.device.free_up)
        self.module, self.allocator = module, module.CuMemAllocator.instance
        rules = "0.28" if release == "real" else release
        bases = (WorkerStub, KvCacheSleep) if settings.get("extension") else (WorkerStub,)
        self.worker: Any = type("WorkerStub", bases, {})(rules, self.allocator, self.device)
        self.executor = ExecutorStub(self.worker)
        self.engine = SleepyEngineStub(self.executor, **settings)
        self.state = state_of(self.engine)
        self.state.shared_weights = shared
        guards.install(self.engine, self.state)

    def sleep(self, level: int = 1, *, kv_only: bool = False) -> bool:
        self.device.busy = True  # async scheduling leaves a step running
        return put_to_sleep(self.engine, self.state, level, kv_only=kv_only)

    def roll_out(self) -> None:
        assert set(self.device.mapped) == set(self.allocator.pointer_to_data)
        assert self.contents(WEIGHTS) == [f"weights {number}" for number in range(len(LAYOUT[WEIGHTS]))]
        assert "undefined" not in self.contents(KV_CACHE), "the pool holds more than the cache, up to 0.28"
        assert self.engine.generate(["a", "b"]) == ["0", "1"]

    def contents(self, tag: str) -> list[str]:
        return [
            self.device.contents.get(pointer, "unmapped")
            for pointer, data in self.allocator.pointer_to_data.items()
            if data.tag == tag
        ]

    def mapped(self) -> int:
        """Units of LAYOUT."""
        return sum(self.device.mapped.values()) // self.device.unit


def real_module(monkeypatch: pytest.MonkeyPatch, driver: DeviceStub) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    from vllm.device_allocator import cumem as real

    monkeypatch.setattr(real, "create_and_map", driver.create_and_map)
    monkeypatch.setattr(real, "unmap_and_release", driver.unmap_and_release)
    monkeypatch.setattr(real, "libcudart", SimpleNamespace(cudaMemcpy=driver.memcpy))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda where=None: driver.synchronize())
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    allocator = real.CuMemAllocator()
    monkeypatch.setattr(real.CuMemAllocator, "instance", allocator)
    for tag, sizes in LAYOUT.items():
        for number, size in enumerate(sizes):
            handle = (0, size * driver.unit, 1000 + len(allocator.pointer_to_data), 0)
            allocator.current_tag = tag
            allocator.python_malloc_callback(handle)
            driver.create_and_map(handle)
            driver.contents[handle[2]] = f"{tag} {number}"
    return real
