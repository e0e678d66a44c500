"""The compiled kernel that merges LoRA into an engine's weights, at sizes of a 7B layer, beside torch's products."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trlpatch.engine.weights_in_place import fused_merge, merge  # noqa: E402
from trlpatch.policy import bit_sums  # noqa: E402
from trlpatch.policy.policy_weights import PolicyWeight, Term  # noqa: E402

pytestmark = pytest.mark.gpu

SHAPES = [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944), (513, 3590)]


def weights(rank: int, factor: Any) -> list[PolicyWeight]:
    generator = torch.Generator("cuda").manual_seed(rank)

    def noise(*shape: int, size: float) -> Any:
        return torch.randn(*shape, generator=generator, device="cuda") * size

    return [
        PolicyWeight(
            f"{n}x{k}",
            noise(n, k, size=0.02).bfloat16(),
            (Term(noise(n, rank, size=0.01).to(factor), noise(rank, k, size=0.01).to(factor), 2.0),),
        )
        for n, k in SHAPES
    ]


@pytest.mark.parametrize("rank", [8, 16, 33, 64])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
def test_it_is_torchs_float32_product_rounded_once(rank: int, factor: Any) -> None:
    made = weights(rank, factor)
    fused = [torch.full_like(one.base, float("nan")) for one in made]
    pairs = list(zip(made, fused, strict=True))
    assert all(fused_merge.mergeable(*pair) for pair in pairs)
    for _ in range(2):
        fused_merge.write(pairs)
    with merge.float32_products():
        for one, found in pairs:
            right = torch.empty_like(found)
            merge.write(one, right)
            # Sums of float32 in another order: a bfloat16 differs where its neighbours are as near.
            assert (found != right).float().mean() < 1e-4
            torch.testing.assert_close(found.float(), right.float(), rtol=2**-7, atol=1e-6)
            assert (found != one.base).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_bits_see_single_elements_and_what_cancels_out(dtype: Any) -> None:
    large = torch.randn(18944, 3584, device="cuda").to(dtype)
    tensors = [large, torch.ones(3584, device="cuda", dtype=dtype)]
    assert bit_sums.wanted(large.device)
    assert all(bit_sums.readable_by_kernel(tensor) for tensor in tensors)
    before = bit_sums.bit_sums(tensors)
    assert all(before == bit_sums.bit_sums(tensors) for _ in range(5))
    for row, column in ((0, 0), (18943, 3583), (9000, 17)):
        kept = large[row, column].clone()
        large[row, column] = kept * 2 + 1
        assert before != bit_sums.bit_sums(tensors)
        large[row, column] = kept
    large[:, 5] *= -1
    assert before != bit_sums.bit_sums(tensors)
    large[:, 5] *= -1
    rows = large[[1, 2]].clone()
    large[[1, 2]] = rows.flip(0)
    assert before != bit_sums.bit_sums(tensors)
    large[[1, 2]] = rows
    assert before == bit_sums.bit_sums(tensors)
