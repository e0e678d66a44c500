"""The kernel of single-adapter layers under Triton's interpreter; tests/gpu/test_single_adapter.py compiles it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.engine.interpreted import inside, outside, run_interpreted  # noqa: E402
from trlpatch.engine.single_adapter.expand import expand  # noqa: E402
from trlpatch.engine.single_adapter.linear import operator  # noqa: E402

pytestmark = pytest.mark.cpu


@outside
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def layer(sizes: list[int], rank: int, *, tokens: int = 37, width: int = 32) -> dict[str, Any]:
    """Arguments of the operator; every third token is without the adapter."""
    generator = torch.Generator().manual_seed(rank)
    base, used = sum(sizes), sum(sizes) + rank * len(sizes)
    full = torch.zeros(used + -used % 64, width)
    full[:used] = torch.randn(used, width, generator=generator)
    slots = torch.zeros(tokens + 3, dtype=torch.int32)
    slots[::3] = -1
    return {
        "x": torch.randn(tokens, width, generator=generator),
        "full": full,
        "b": torch.randn(base, rank, generator=generator) / rank,
        "bias": torch.randn(base, generator=generator) if rank == 8 else None,
        "token_slots": slots,
        "active_slots": torch.tensor([-1, 0], dtype=torch.int32),
        "no_adapter": None,
        "starts": [sum(sizes[:number]) for number in range(1, len(sizes))],
    }


def expanded(given: dict[str, Any]) -> Any:
    wide = torch.nn.functional.linear(given["x"], given["full"])
    names = ("b", "bias", "token_slots", "active_slots", "starts")
    return expand(wide, *(given[name] for name in names))


@inside
@pytest.mark.parametrize("sizes", [[128], [64, 64], [128, 64, 64]])
@pytest.mark.parametrize("rank", [8, 16, 96])
def test_it_computes_what_the_definition_says(sizes: list[int], rank: int) -> None:
    given = layer(sizes, rank)
    torch.testing.assert_close(expanded(given), operator()(*given.values()))


@inside
@pytest.mark.parametrize("active", [[-1, 0], [-1, -1]], ids=["mixed", "none in the batch"])
def test_an_adapter_that_is_no_number_is_not_in_tokens_without_it(active: list[int]) -> None:
    """As after a level-2 sleep that discarded the buffers, or of an adapter that diverged."""
    given = layer([128, 64, 64], 16)
    given["b"][:] = float("nan")
    given["active_slots"] = torch.tensor(active, dtype=torch.int32)
    without = given["token_slots"][:37] < 0
    found = expanded(given)
    assert found[without].isfinite().all()
    assert found[~without].isfinite().all() == (max(active) < 0)
