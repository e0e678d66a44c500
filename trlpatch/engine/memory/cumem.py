"""Drive vLLM's CuMemAllocator, in the process that holds it: unmap one pool, and wake without mapping anything twice.

The allocator gives every allocation a tag, "weights" or "kv_cache", from 0.32 also "runtime" (what is made beside the
KV cache; from 0.33 the LoRA buffers, too). What differs between releases:

- up to 0.27 `wake_up(tags)` maps whatever bears one of the tags, mapped or not; mapping twice leaks a block of the
  same size and fails in the driver. From 0.28 it skips what is not asleep, and has `discard(tags)`.
- `AllocationData.is_asleep` came with 0.25.1. Below, only the executor's `sleeping_tags` says what is unmapped.
- from 0.32 `wake_up(tags)` maps also whatever sleeps under a tag that is not one of its `DEFERRABLE_TAGS`.
- a failed wake is not rolled back in any of them (vllm-project/vllm#34600).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trlpatch.engine.memory import device
from trlpatch.engine.memory.device import GIB
from trlpatch.engine.probes import KV_CACHE
from trlpatch.engine.protocols import AllocationData, CuMemAllocator
from trlpatch.errors import EngineWithoutSleep, NotEnoughMemory

_MODULE = "vllm.device_allocator.cumem"
_PACKAGE = "vllm.device_allocator"
_MAPPED_EARLY = "_trlpatch_mapped_early"
_SPARE = GIB
"""Free memory above what is to be mapped, for the rollout's activations; below it torch's cache is emptied first."""


def allocator() -> CuMemAllocator | None:
    """The CuMemAllocator of this process; None when it has none, or vLLM is not imported."""
    found: CuMemAllocator | None = getattr(getattr(sys.modules.get(_MODULE), "CuMemAllocator", None), "instance", None)
    return found


def pool_bytes(tag: str) -> int:
    """The size of a pool, mapped or not; 0 when it is not in this process."""
    instance = allocator()
    return 0 if instance is None else sum(_bytes(data) for data in _tagged(instance, {tag}))


def bytes_beside(tag: str) -> int:
    """The size of all pools but one, mapped or not; 0 when they are not in this process."""
    instance = allocator()
    others = [] if instance is None else [data for data in instance.pointer_to_data.values() if data.tag != tag]
    return sum(_bytes(data) for data in others)


def discard_kv_cache(worker: object) -> int:
    """Unmap the KV cache's pool and nothing else; return the bytes given back to the driver.

    Runs in the worker (`collective_rpc` calls it with the worker). Memory must not be in use: requests finished,
    caches reset. Allocations that are unmapped already are left alone.

    Raises:
        EngineWithoutSleep: the worker has no such pool.
    """
    instance = allocator()
    if instance is None:
        raise EngineWithoutSleep(
            "discarding the KV cache: this process has no CuMemAllocator; expected an engine built with "
            "enable_sleep_mode=True on CUDA"
        )
    # Up to 0.25.0 nothing waits before unmapping, and async scheduling may have left a step running.
    device.synchronize()
    mapped = [data for data in _tagged(instance, {KV_CACHE}) if not getattr(data, "is_asleep", False)]
    if callable(getattr(instance, "discard", None)):
        instance.discard((KV_CACHE,))
    else:
        for data in mapped:
            sys.modules[_MODULE].unmap_and_release(data.handle)
            _mark(data, asleep=True)
    return sum(_bytes(data) for data in mapped)


@contextmanager
def whole_wake(tags: Collection[str] | None) -> Iterator[None]:
    """Surround vLLM's own wake of `tags` (None: all of them): enough memory, nothing mapped twice, nothing left half.

    After any error the KV cache is unmapped again, and a retry passes over weights that were restored: up to 0.27 vLLM
    would map them a second time.

    Raises:
        NotEnoughMemory: before anything is mapped if the memory is not there, and instead of the driver's RuntimeError
            if it goes missing on the way.
    """
    instance = allocator()
    module: Any = sys.modules.get(_MODULE)
    if instance is None or not hasattr(module, "create_and_map"):
        yield
        return
    early: set[int] = instance.__dict__.setdefault(_MAPPED_EARLY, set())
    skip = early | {_pointer(data) for data in _tagged(instance, None) if getattr(data, "is_asleep", None) is False}
    wanted = [data for data in _mapped_by_waking(instance, tags) if _pointer(data) not in skip]
    needed = sum(_bytes(data) for data in wanted)
    where = int(wanted[0].handle[0]) if wanted else None
    free = device.free_up(needed + _SPARE, where) if wanted else None
    if free is not None and free < needed:
        raise NotEnoughMemory(_too_little(tags, needed, free))
    create_and_map = module.create_and_map

    def create_and_map_once(handle: Sequence[int]) -> None:
        pointer = int(handle[2])
        if pointer in skip:
            return
        try:
            create_and_map(handle)
        except RuntimeError as error:
            raise NotEnoughMemory(_too_little(tags, needed, free)) from error
        skip.add(pointer)
        early.add(pointer)

    module.create_and_map = create_and_map_once
    try:
        yield
    except BaseException:
        _unmap_kv_cache_again(module, instance, early)
        raise
    else:
        early.clear()
    finally:
        module.create_and_map = create_and_map


def _unmap_kv_cache_again(module: Any, instance: CuMemAllocator, early: set[int]) -> None:
    for data in _tagged(instance, {KV_CACHE}):
        if _pointer(data) in early:
            device.synchronize()
            module.unmap_and_release(data.handle)
            _mark(data, asleep=True)
            early.discard(_pointer(data))


def _tagged(instance: CuMemAllocator, tags: Collection[str] | None) -> list[AllocationData]:
    return [data for data in instance.pointer_to_data.values() if tags is None or data.tag in tags]


def _mapped_by_waking(instance: CuMemAllocator, tags: Collection[str] | None) -> list[AllocationData]:
    deferrable = getattr(sys.modules.get(_PACKAGE), "DEFERRABLE_TAGS", None)
    if tags is None or deferrable is None:
        return _tagged(instance, tags)
    return [data for data in instance.pointer_to_data.values() if data.tag in tags or data.tag not in deferrable]


def _bytes(data: AllocationData) -> int:
    return int(data.handle[1])


def _pointer(data: AllocationData) -> int:
    return int(data.handle[2])


def _mark(data: AllocationData, *, asleep: bool) -> None:
    if hasattr(data, "is_asleep"):
        setattr(data, "is_asleep", asleep)  # noqa: B010 - not in every release


def _too_little(tags: Collection[str] | None, needed: int, free: int | None) -> str:
    what = "everything" if tags is None else " and ".join(sorted(tags))
    found = "the driver refused it" if free is None else f"{free / GIB:.2f} GiB are free, torch's cache emptied"
    held = device.reserved_bytes()[0]
    return (
        f"waking the engine ({what}) needs {needed / GIB:.2f} GiB of device memory, but {found}; torch holds "
        f"{held / GIB:.2f} GiB in this process, the engine's own pools included. Let go of tensors that outlive the "
        "training step, train with a smaller per_device_train_batch_size or max_completion_length, or build the "
        "engine with a smaller gpu_memory_utilization. The engine is still asleep, and waking it can be tried again"
    )
