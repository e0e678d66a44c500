"""What rounding keeps of an adapter is measured, and said."""

from __future__ import annotations

import math

import pytest

pytestmark = pytest.mark.torch


def survival(scale: float, dtype: str) -> object:
    import torch

    from trlpatch.export.survival import Survival

    torch.manual_seed(0)
    base = (0.02 * torch.randn(100, 64)).to(torch.bfloat16).float()
    found = Survival(getattr(torch, dtype))
    found.add("layer", base, base + scale * torch.randn(100, 64))
    return found


@pytest.mark.parametrize(
    ("scale", "dtype", "low", "high"),
    [
        (1e-5, "bfloat16", 0.8, 1.3), (1e-5, "float16", 0.1, 0.6), (1e-5, "float32", 0.0, 1e-4),
        (1e-2, "bfloat16", 0.0, 0.01),
    ],
)  # fmt: skip
def test_what_is_lost_is_the_error_of_rounding_over_the_change(
    scale: float, dtype: str, low: float, high: float
) -> None:
    found = survival(scale, dtype)
    assert low <= found.lost() <= high  # type: ignore[attr-defined]


def test_float16_is_suggested_where_it_keeps_more() -> None:
    coarse, fine = survival(1e-5, "bfloat16"), survival(1e-5, "float16")
    assert "(dtype float16)" in coarse.sentence()  # type: ignore[attr-defined]
    assert "dtype float16" not in fine.sentence()  # type: ignore[attr-defined]
    assert coarse.unmoved() > 0.5 > fine.unmoved()  # type: ignore[attr-defined]


def test_float16_is_not_suggested_where_it_keeps_nothing_either() -> None:
    import torch

    from trlpatch.export.survival import Survival

    # Of a float32 base: its own rounding is in both sums, and is less in float16, where it exceeds the change, too.
    found = Survival(torch.bfloat16, squares={"": 1.0, "bfloat16": 400.0, "float16": 9.0})
    assert "bfloat16 keeps 0%" in found.sentence()
    assert "dtype float16" not in found.sentence()
    assert "float32 keeps all of it" in found.sentence()


def test_an_adapter_that_changes_nothing_is_said_to() -> None:
    found = survival(0.0, "bfloat16")
    assert found.lost() is None  # type: ignore[attr-defined]
    assert "the export is the base model" in found.sentence()  # type: ignore[attr-defined]


def test_what_is_not_finite_is_refused() -> None:
    import torch

    from trlpatch.errors import CannotExport
    from trlpatch.export.survival import require_finite

    with pytest.raises(CannotExport, match="not finite"):
        require_finite("layer", torch.tensor([1.0, math.nan]), torch.float32)
    with pytest.raises(CannotExport, match="ends at"):
        require_finite("layer", torch.tensor([1.0, 1e5]), torch.float16)
