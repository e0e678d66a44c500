"""An adapter of odd shapes and the buffers that it is copied into, for the tests of the fused copy on CPU and GPU."""

from __future__ import annotations

from typing import Any

from trlpatch.engine.adapter_sync.staging import Target
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.base_weights import Spots
from trlpatch.policy.change_detection import ContentSums
from trlpatch.policy.layer_state import Contents

SLOT = 1
WIDTHS, OUTS = (300, 64, 17), (700, 64, 33)


def adapter(dtype: Any, rank: int, *, device: str = "cpu", coarse: bool = False) -> LoraWeights:
    """Three layers; `coarse` values and scalings are exact in bfloat16, before and after scaling."""
    import torch

    generator = torch.Generator().manual_seed(rank)

    def weight(*shape: int) -> Any:
        values = torch.randn(shape, generator=generator)
        return ((values * 8).round() if coarse else values).to(device, dtype)

    scalings = [2.0, 0.5, 4.0] if coarse else [2.0, 0.3, 1.7]
    a, b = [weight(rank, width) for width in WIDTHS], [weight(out, rank) for out in OUTS]
    return LoraWeights(("one", "two", "three"), a, b, scalings, [])


def targets(dtype: Any, rank: int, width: int, *, device: str = "cpu") -> tuple[list[Target], list[Any]]:
    """(targets of a slot, all buffers): sevens where nothing is written, so that a stray write shows."""
    import torch

    def filled(*shape: int) -> Any:
        return torch.full(shape, 7.0, dtype=dtype, device=device)

    buffers = [filled(3, 1, width, one) for one in WIDTHS] + [filled(3, 1, one, width) for one in OUTS]
    staging = [filled(rank, one) for one in WIDTHS] + [filled(one, width) for one in OUTS]
    slots = [buffer[SLOT, 0, :rank] if index < 3 else buffer[SLOT, 0] for index, buffer in enumerate(buffers)]
    return [Target(*both) for both in zip(staging, slots, strict=True)], buffers


def spots(dtype: Any, *, device: str = "cpu") -> Spots:
    """Pieces of two base weights, one of them shorter than the other."""
    import torch

    whole = torch.arange(700, device=device).to(dtype)
    pieces = [whole[16:528], whole[528:]]
    return Spots(Contents([]), [whole], [whole.data_ptr()], pieces, ContentSums(pieces))


def assert_copied(weights: LoraWeights, made: list[Target], buffers: list[Any]) -> None:
    """Scaled in float32, rounded once, and nothing else written."""
    import torch

    scales = [1.0] * len(weights.a) + weights.scalings
    sources = [*weights.a, *weights.b]
    for source, target, buffer, scale in zip(sources, made, buffers, scales, strict=True):
        columns = source.shape[1]
        expected = (source.float() * torch.tensor(scale, device=source.device)).to(buffer.dtype)
        for written in (target.staging, target.slot):
            assert torch.equal(written[:, :columns], expected)
            assert bool((written[:, columns:] == 7).all())
        written = target.slot.numel() if columns == target.slot.shape[1] else source.numel()
        assert int((buffer == 7).sum()) == buffer.numel() - written + int((expected == 7).sum())


def check_base_is_hashed_apart(source: Any, base: Any, *, device: str = "cpu") -> None:
    """Spots of base weights move an answer of their own, are not written, and leave that of the adapter alone."""
    import torch

    from trlpatch.engine.adapter_sync.fused_copy import FusedCopy

    weights, under = adapter(source, 16, device=device), spots(base, device=device)
    made, buffers = targets(torch.float16, 16, 16, device=device)
    copy = FusedCopy(weights, made)
    assert copy.start(weights, made, SLOT).base_glance(under) is None, "they were not read"
    weights.derived["base spots"] = under
    before = [piece.clone() for piece in under.pieces]
    first = copy.start(weights, made, SLOT)
    assert copy.start(weights, made, SLOT).base_glance(under) == first.base_glance(under) is not None
    assert first.base_glance(spots(base, device=device)) is None, "others were read"
    assert FusedCopy(weights, made).start(weights, made, SLOT).base_glance(under) != first.base_glance(under)
    assert all(map(torch.equal, under.pieces, before))
    answer = copy.start(weights, made, SLOT)
    content, glances = answer.wait(), [answer.base_glance(under)]
    for piece, place in ((0, 0), (0, 100), (0, -1), (1, 0), (1, 57)):
        under.pieces[piece].view(torch.int8)[place] ^= 1
        answer = copy.start(weights, made, SLOT)
        assert answer.wait() == content
        glances.append(answer.base_glance(under))
    assert len(set(glances)) == 6
    weights.b[1][3, 3] += 1
    answer = copy.start(weights, made, SLOT)
    assert answer.wait() > content
    assert answer.base_glance(under) == glances[-1]
    assert_copied(weights, made, buffers)


def check_answer_outlives_next_copy(*, device: str = "cpu") -> None:
    """An answer that is waited for after the next copy was started is still that of its own copy."""
    import torch

    from trlpatch.engine.adapter_sync.fused_copy import FusedCopy

    weights = adapter(torch.float32, 16, device=device)
    made, _ = targets(torch.float16, 16, 16, device=device)
    copy = FusedCopy(weights, made)
    first = copy.start(weights, made, SLOT)
    weights.a[0][0, 0] += 1
    second = copy.start(weights, made, SLOT)
    assert (first.wait(), second.wait()) == (1, 2)
