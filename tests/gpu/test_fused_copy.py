"""The compiled kernel of the fused copy against torch's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("triton")

from tests.fakes.adapter_copies import (  # noqa: E402
    SLOT,
    adapter,
    assert_copied,
    check_answer_outlives_next_copy,
    check_base_is_hashed_apart,
    targets,
)
from trlpatch.engine.adapter_sync.fused_copy import FusedCopy  # noqa: E402
from trlpatch.policy.adapter import LoraWeights  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "width"), [(16, 16), (8, 16), (5, 8)])
def test_staging_and_slot_are_bit_for_bit_those_of_torch(source: Any, target: Any, rank: int, width: int) -> None:
    weights = adapter(source, rank, device="cuda")
    made, buffers = targets(target, rank, width, device="cuda")
    copy = FusedCopy(weights, made)
    for _ in range(3):
        assert copy.run(weights, made, SLOT) == 1
        assert_copied(weights, made, buffers)


def test_every_element_moves_the_answer_by_itself() -> None:
    weights = adapter(torch.float32, 16, device="cuda")
    made, buffers = targets(torch.bfloat16, 16, 16, device="cuda")
    copy = FusedCopy(weights, made)
    last = copy.run(weights, made, SLOT)
    for parameter in (*weights.a, *weights.b):
        bits = parameter.view(torch.int32).view(-1)
        for place in range(0, bits.numel(), 97):
            bits[place] ^= 1
            now = copy.run(weights, made, SLOT)
            assert now > last
            last = now
    assert copy.run(weights, made, SLOT) == last
    assert_copied(weights, made, buffers)


def test_a_rectangle_of_moves_is_seen() -> None:
    weights = adapter(torch.float32, 16, device="cuda")
    made, _ = targets(torch.bfloat16, 16, 16, device="cuda")
    copy = FusedCopy(weights, made)
    last = copy.run(weights, made, SLOT)
    bits = weights.a[0].view(torch.int32)
    for row, column, way in ((0, 1, 1), (0, 3, -1), (2, 1, -1), (2, 3, 1)):
        bits[row, column] += way * 2**20
    assert copy.run(weights, made, SLOT) > last


def test_fused_adamw_is_seen_at_the_shape_of_7b() -> None:
    """Its writes move no version counter; the copy reads after them, on the same stream."""
    from trlpatch.engine.adapter_sync.staging import Target

    widths = [3584, 3584, 3584, 3584, 3584, 3584, 18944] * 28
    outs = [3584, 512, 512, 3584, 18944, 18944, 3584] * 28
    a = [torch.nn.Parameter(torch.randn(16, width, device="cuda")) for width in widths]
    b = [torch.nn.Parameter(torch.randn(out, 16, device="cuda")) for out in outs]
    weights = LoraWeights(tuple(map(str, range(len(a)))), a, b, [2.0] * len(a), [])
    pairs = [
        (torch.empty_like(one, dtype=torch.bfloat16), torch.empty_like(one, dtype=torch.bfloat16)) for one in (*a, *b)
    ]
    made = [Target(*pair) for pair in pairs]
    copy = FusedCopy(weights, made)
    optimizer = torch.optim.AdamW([*a, *b], lr=1e-6, fused=True)
    last = copy.run(weights, made, SLOT)
    for _ in range(5):
        for parameter in (*a, *b):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        now = copy.run(weights, made, SLOT)
        assert now > last
        last = now
        for scale, source, target in zip([1.0] * len(a) + [2.0] * len(b), (*a, *b), made, strict=True):
            assert torch.equal(target.slot, (source.detach() * scale).bfloat16())
            assert torch.equal(target.staging, target.slot)
    assert copy.run(weights, made, SLOT) == last


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.int8])
def test_the_base_is_hashed_apart_and_not_written(source: Any, base: Any) -> None:
    check_base_is_hashed_apart(source, base, device="cuda")


def test_an_answer_outlives_the_next_copy() -> None:
    check_answer_outlives_next_copy(device="cuda")
