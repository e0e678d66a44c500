"""The arithmetic of the fused copy, in Triton's interpreter. tests/gpu has the compiled kernel.

Triton has to be told before it is imported, and vLLM imports it: the cases run in a process of their own.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("triton")

from tests.engine.interpreted import INTERPRETED, inside, outside, run_interpreted  # noqa: E402
from tests.fakes.adapter_copies import (  # noqa: E402
    SLOT,
    adapter,
    assert_copied,
    check_answer_outlives_next_copy,
    check_base_is_hashed_apart,
    targets,
)
from trlpatch.engine.adapter_sync.fused_copy import FusedCopy, NotFused  # noqa: E402

pytestmark = pytest.mark.cpu


@outside
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="would be possible")
def test_a_cpu_is_refused() -> None:
    with pytest.raises(NotFused, match="a cpu device"):
        FusedCopy(adapter(torch.float32, 4), targets(torch.bfloat16, 4, 16)[0])


@inside
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "width"), [(16, 16), (5, 8)])
def test_staging_and_slot_hold_the_scaled_adapter(source: Any, target: Any, rank: int, width: int) -> None:
    """The interpreter cuts off where a device rounds to bfloat16, so the values need no rounding there."""
    weights = adapter(source, rank, coarse=target == torch.bfloat16)
    made, buffers = targets(target, rank, width)
    copy = FusedCopy(weights, made)
    assert copy.run(weights, made, SLOT) == copy.run(weights, made, SLOT) == 1
    assert_copied(weights, made, buffers)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_moves_with_any_bit(dtype: Any) -> None:
    weights = adapter(dtype, 16)
    made, _ = targets(torch.bfloat16, 16, 16)
    copy = FusedCopy(weights, made)
    seen = [copy.run(weights, made, SLOT)]
    assert copy.run(weights, made, SLOT) == seen[-1]
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for number, parameter in enumerate((*weights.a, *weights.b)):
        bits = parameter.view(integer).view(-1)
        for place, bit in ((0, 0), (bits.numel() // 2, 14 - number), (-1, 2 * number)):
            bits[place] ^= 1 << bit
            seen.append(copy.run(weights, made, SLOT))
    assert copy.run(weights, made, SLOT) == seen[-1]
    assert seen == sorted(set(seen))


@inside
@pytest.mark.parametrize("columns", [(0, 1), (3, 259)])
def test_moves_that_cancel_out_and_swaps_move_the_answer(columns: tuple[int, int]) -> None:
    weights = adapter(torch.float32, 16)
    made, _ = targets(torch.bfloat16, 16, 16)
    copy = FusedCopy(weights, made)
    one, other = columns
    rows = weights.a[0].view(torch.int32)
    seen = [copy.run(weights, made, SLOT)]
    for distance in (1, 2**20):
        for row, sign in ((2, 1), (7, -1)):
            rows[row, one] += sign * distance
            rows[row, other] -= sign * distance
            seen.append(copy.run(weights, made, SLOT))
    rows[0, one], rows[0, other] = rows[0, other].clone(), rows[0, one].clone()
    seen.append(copy.run(weights, made, SLOT))
    assert seen == sorted(set(seen))


@inside
def test_the_same_values_elsewhere_are_the_same() -> None:
    """Another weights object has other addresses, which the table of this one must not be used for."""
    weights, twin = adapter(torch.float32, 16), adapter(torch.float32, 16)
    made, buffers = targets(torch.float16, 16, 16)
    copy = FusedCopy(weights, made)
    assert copy.run(weights, made, SLOT) == copy.run(twin, made, SLOT) == 1
    twin.b[1][3, 3] = 9.0
    assert copy.run(twin, made, SLOT) == 3
    assert_copied(twin, made, buffers)
    assert copy.run(weights, made, SLOT) == 4


@inside
def test_weights_of_two_dtypes_are_copied() -> None:
    weights = adapter(torch.float32, 16)
    weights.b[2] = weights.b[2].bfloat16()
    made, buffers = targets(torch.float16, 16, 16)
    copy = FusedCopy(weights, made)
    assert copy.run(weights, made, SLOT) == 1
    assert_copied(weights, made, buffers)
    weights.b[2][0, 0] += 1
    assert copy.run(weights, made, SLOT) == 2


@inside
@pytest.mark.parametrize("what", ["a transposed source", "float64"])
def test_what_the_kernel_cannot_read_is_refused(what: str) -> None:
    weights = adapter(torch.float32, 16)
    made, buffers = targets(torch.float16, 16, 16)
    weights.a[0] = weights.a[0].t().contiguous().t() if "transposed" in what else weights.a[0].double()
    with pytest.raises(NotFused):
        FusedCopy(weights, made).run(weights, made, SLOT)
    assert all(bool((buffer == 7).all()) for buffer in buffers)


@inside
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.int8])
def test_the_base_is_hashed_apart_and_not_written(source: Any, base: Any) -> None:
    check_base_is_hashed_apart(source, base)


@inside
def test_an_answer_outlives_the_next_copy() -> None:
    check_answer_outlives_next_copy()
