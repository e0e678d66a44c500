"""Does it fit? What is said when it does not."""

from __future__ import annotations

import re

import pytest

from trlpatch.errors import NotEnoughMemory
from trlpatch.loading.memory import GIB, DeviceMemory, MemoryRequirement, require_memory, require_memory_for_copy

H200 = DeviceMemory("cuda:0 (NVIDIA H200)", free=int(139 * GIB), total=140 * GIB)


def room(free: float, total: float = 24) -> DeviceMemory:
    return DeviceMemory("cuda:0 (a GPU)", int(free * GIB), int(total * GIB))


def need(utilization: float | None = 0.5, weights: float = 2, copy: float = 0, **changes: object) -> MemoryRequirement:
    return MemoryRequirement(
        utilization, int(weights * GIB), copy=int(copy * GIB), why_copy="share_weights=False", **changes
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (H200, need(0.6, 15.2)),
        (H200, need(0.6, 15.2, copy=15.2)),
        (room(12.1), need(0.5)),
        (room(6), need(None, 2, kv_cache=int(4 * GIB))),
    ],
)
def test_what_fits_is_let_through(there: DeviceMemory, wanted: MemoryRequirement) -> None:
    require_memory("m", there, wanted)


@pytest.mark.parametrize(
    ("there", "wanted", "says"),
    [
        (
            room(8),
            need(0.5),
            "asks for 12.0 GiB of its 24.0 GiB, and 8.0 GiB are free; set gpu_memory_utilization=0.32 or less",
        ),
        (room(8), need(0.5, 8), "the engine's weights take 8.0 GiB of that: load a smaller model"),
        (room(23), need(0.5, 14), "weights alone take 14.0 GiB.*set gpu_memory_utilization=0.69 or more"),
        (room(12), need(0.5, 14), "weights alone take 14.0 GiB.*with 12.0 GiB free, load a smaller model"),
        (
            room(23),
            need(0.9, 6, copy=6),
            r"own copy of the weights takes 6.0 GiB more \(share_weights=False\).*gpu_memory_utilization=0.69 or less",
        ),
        (
            room(3),
            need(None, 2, kv_cache=2 * GIB),
            "take 4.0 GiB, and 3.0 GiB are free; set a smaller kv_cache_memory",
        ),
    ],
)
def test_what_does_not_fit_says_what_to_set(there: DeviceMemory, wanted: MemoryRequirement, says: str) -> None:
    with pytest.raises(NotEnoughMemory, match=says):
        require_memory("m", there, wanted)


@pytest.mark.parametrize("free", [6.0, 9.5, 12.7, 23.9])
def test_the_number_that_is_named_would_have_fitted(free: float) -> None:
    there = room(free)
    with pytest.raises(NotEnoughMemory) as raised:
        require_memory("m", there, need(1.0, 1, copy=1))
    (named,) = re.findall(r"set gpu_memory_utilization=([0-9.]+) or less", str(raised.value))
    require_memory("m", there, need(float(named), 1, copy=1))


def test_a_copy_that_nobody_expected() -> None:
    require_memory_for_copy("m", room(6), need(0.5, 2, copy=6))
    with pytest.raises(
        NotEnoughMemory, match=r"cannot be shared.*copy of 6.0 GiB.*set gpu_memory_utilization=0.28 or"
    ):
        require_memory_for_copy("m", room(1), need(0.5, 2, copy=6))
    with pytest.raises(NotEnoughMemory, match=r"free; load a smaller model"):
        require_memory_for_copy("m", room(1), need(0.3, 5, copy=6))
