"""vLLM's sleep machinery over a device that is only accounted for: the parts that need a GPU.

`DeviceStub` is the driver: mapping mapped memory and unmapping unmapped memory are assertions, and memory that was
unmapped comes back with undefined contents. `AllocatorStub` follows CuMemAllocator of one of four releases, the
executor and the engine those of 0.23 to 0.28. tests/gpu/sleep_cycles.py runs the same on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS, WEIGHTS

LAYOUT = {WEIGHTS: (3, 1), KV_CACHE: (4, 2, 2)}
"""Units of each allocation of a pool."""
RELEASES = ("0.23", "0.26", "0.28")
RUNTIME = "runtime"
RUNTIME_SIZE = 1
"""Of the pool that 0.32 adds, in units of LAYOUT."""

Handle = tuple[int, int, int, int]


class DeviceStub:
    """Bytes; of `total`, the trainer uses `taken` and torch's cache holds `cached`. `busy` while kernels run."""

    def __init__(self, unit: int = 2**30) -> None:
        self.unit = unit
        self.total, self.taken, self.cached = 16 * unit, 0, 0
        self.busy = False
        self.attempts = 0
        self.mapped: dict[int, int] = {}
        self.contents: dict[int, str] = {}
        self.refuse_after: int | None = None
        """The driver refuses memory after this many more mappings, whatever `free` says."""
        self.backups: dict[int, str] = {}

    @property
    def free(self) -> int:
        return self.total - self.taken - self.cached - sum(self.mapped.values())

    def create_and_map(self, handle: Handle) -> None:
        _, size, pointer, _ = handle
        assert pointer not in self.mapped, f"{pointer} is mapped a second time"
        self.attempts += 1
        if size > self.free or self.refuse_after == 0:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:95")
        if self.refuse_after is not None:
            self.refuse_after -= 1
        self.mapped[pointer] = size
        self.contents[pointer] = "undefined"

    def unmap_and_release(self, handle: Handle) -> None:
        _, _, pointer, _ = handle
        assert pointer in self.mapped, f"{pointer} is unmapped a second time"
        assert not self.busy, "unmapped while kernels run"
        del self.mapped[pointer], self.contents[pointer]

    def synchronize(self) -> None:
        self.busy = False

    def memcpy(self, target: int, source: int, size: int) -> None:
        """cudaMemcpy between an allocation and its backup on the CPU."""
        assert (target in self.mapped) != (source in self.mapped), "copied from or to unmapped memory"
        if source in self.mapped:
            self.backups[target] = self.contents[source]
        else:
            self.contents[target] = self.backups.pop(source)

    def free_up(self, wanted: int, device: int | None = None) -> int:
        if self.free < wanted:
            self.cached = 0
        return self.free


@dataclass
class AllocationStub:
    """vLLM's AllocationData up to 0.25.0."""

    handle: Handle
    tag: str
    cpu_backup_tensor: Any = None


@dataclass
class StatedAllocationStub(AllocationStub):
    """With the field of 0.25.1."""

    is_asleep: bool = False


class AllocatorStub:
    """CuMemAllocator of one release."""

    def __init__(self, release: str, module: Any, device: DeviceStub) -> None:
        self.release, self._module, self._device = release, module, device
        self.pointer_to_data: dict[int, Any] = {}
        self._looks = release in ("0.28", "0.32")  # whether an allocation sleeps already
        if self._looks:
            self.discard = self._discard

    def allocate(self, size: int, tag: str, contents: str) -> None:
        pointer = 1000 + len(self.pointer_to_data)
        kind = AllocationStub if self.release == "0.23" else StatedAllocationStub
        self.pointer_to_data[pointer] = kind((0, size, pointer, 0), tag)
        self._module.create_and_map(self.pointer_to_data[pointer].handle)
        self._device.contents[pointer] = contents

    def get_current_usage(self) -> int:
        return sum(data.handle[1] for data in self.pointer_to_data.values())

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        for pointer, data in self.pointer_to_data.items():
            if self._looks and data.is_asleep:
                continue
            if data.tag in offload_tags:
                data.cpu_backup_tensor = self._device.contents[pointer]
            self._unmap(data)

    def _discard(self, tags: tuple[str, ...]) -> None:
        for data in self.pointer_to_data.values():
            if data.tag in tags and not data.is_asleep:
                self._device.synchronize()
                self._unmap(data)

    def _unmap(self, data: Any) -> None:
        self._module.unmap_and_release(data.handle)
        if self.release != "0.23":
            data.is_asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        for pointer, data in self.pointer_to_data.items():
            if self._looks and not data.is_asleep:
                continue
            restored = self.release == "0.32" and data.tag not in SLEEP_TAGS
            if tags is None or data.tag in tags or restored:
                self._module.create_and_map(data.handle)
                if self.release != "0.23":
                    data.is_asleep = False
                if data.cpu_backup_tensor is not None:
                    self._device.contents[pointer] = data.cpu_backup_tensor
                    data.cpu_backup_tensor = None


def cumem_stub(release: str, device: DeviceStub) -> Any:
    """A module such as `vllm.device_allocator.cumem`, with both pools allocated and mapped."""
    module: Any = ModuleType("vllm.device_allocator.cumem")
    module.create_and_map, module.unmap_and_release = device.create_and_map, device.unmap_and_release
    allocator = AllocatorStub(release, module, device)
    for tag, sizes in LAYOUT.items():
        for number, size in enumerate(sizes):
            allocator.allocate(size * device.unit, tag, f"{tag} {number}")
    if release == "0.32":
        allocator.allocate(RUNTIME_SIZE * device.unit, RUNTIME, RUNTIME)
    module.CuMemAllocator = SimpleNamespace(instance=allocator)
    return module


class WorkerStub:
    """gpu_worker.Worker of 0.21 to 0.28, as far as sleep goes."""

    def __init__(self, release: str, allocator: Any, device: DeviceStub) -> None:
        self.release, self.allocator, self._device = release, allocator, device
        self.repaired = 0
        self.repair_fails = False

    def sleep(self, level: int = 1) -> None:
        if self.release != "0.23":
            self._device.synchronize()
        self.allocator.sleep((WEIGHTS, RUNTIME) if level == 1 else (RUNTIME,))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.allocator.wake_up(tags)
        if tags is None or KV_CACHE in tags:
            self.post_kv_cache_wake_up()

    def post_kv_cache_wake_up(self) -> None:
        if self.repair_fails:
            raise ValueError("the block tables could not be laid out")
        self.repaired += 1
        for pointer, data in self.allocator.pointer_to_data.items():
            if data.tag == KV_CACHE:
                self._device.contents[pointer] = "laid out anew"


class ExecutorStub:
    """Executor.sleep and wake_up with their early returns, over one worker."""

    def __init__(self, worker: Any) -> None:
        self.driver_worker = worker
        self.sleeping_tags: set[str] = set()
        self.is_sleeping = False

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        call = getattr(self.driver_worker, method) if isinstance(method, str) else partial(method, self.driver_worker)
        return [call(*args, **kwargs or {})]

    def sleep(self, level: int = 1) -> None:
        if self.is_sleeping:
            return
        self.collective_rpc("sleep", kwargs={"level": level})
        self.sleeping_tags = set(SLEEP_TAGS)
        self.is_sleeping = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        if not self.is_sleeping or any(tag not in self.sleeping_tags for tag in tags or ()):
            return
        self.collective_rpc("wake_up", kwargs={"tags": tags})
        self.sleeping_tags -= set(tags or SLEEP_TAGS)
        self.is_sleeping = bool(self.sleeping_tags)


class LlmEngineStub:
    """LLMEngine over InprocClient, or (`elsewhere`) over a client of another process."""

    def __init__(self, executor: Any, *, elsewhere: bool, extension: str, sleep: bool, lora_rank: int | None) -> None:
        self.core_executor = executor
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                enable_sleep_mode=sleep, model="/models/tiny", logprobs_mode="processed_logprobs", max_model_len=256
            ),
            lora_config=None if lora_rank is None else SimpleNamespace(max_lora_rank=lora_rank),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, worker_extension_cls=extension),
        )
        if not elsewhere:
            self.model_executor = executor
        self.unfinished = False
        self.resets: list[str] = []

    def add_request(self, request_id: str, prompt: Any, params: Any = None) -> str:
        assert not self.core_executor.sleeping_tags, "a request reached an engine that sleeps"
        return request_id

    def has_unfinished_requests(self) -> bool:
        return self.unfinished

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.resets.append("all")
        if level:
            self.core_executor.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.core_executor.wake_up(tags)

    def reset_mm_cache(self) -> None:
        self.resets.append("mm")

    def reset_encoder_cache(self) -> None:
        self.resets.append("encoder")

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if not hasattr(self, "model_executor"):
            assert isinstance(method, str), "functions are not sent to another process"
        found: list[Any] = self.core_executor.collective_rpc(method, args=args, kwargs=kwargs)
        return found


class SleepyEngineStub:
    """`vllm.LLM` with sleep mode, over the stubs above."""

    def __init__(
        self,
        executor: Any,
        *,
        elsewhere: bool = False,
        extension: str = "",
        sleep: bool = True,
        lora_rank: int | None = 16,
    ) -> None:
        self.llm_engine = LlmEngineStub(
            executor, elsewhere=elsewhere, extension=extension, sleep=sleep, lora_rank=lora_rank
        )
        self.prefix_cache_in_use = False

    def generate(self, prompts: list[str], **_: Any) -> list[str]:
        return [self.llm_engine.add_request(str(number), prompt) for number, prompt in enumerate(prompts)]

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.llm_engine.sleep(level=level, mode=mode)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.llm_engine.wake_up(tags)

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        return self.llm_engine.collective_rpc(method, timeout, args, kwargs)

    def reset_prefix_cache(self) -> bool:
        self.llm_engine.resets.append("prefix")
        return not self.prefix_cache_in_use
