"""The operator of a linear layer with one adapter, against the same computed slice by slice and token by token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")

from trlpatch.engine.single_adapter import linear  # noqa: E402


def layer(sizes: list[int], *, tokens: int, width: int = 24, rank: int = 4, bias: bool = True) -> dict[str, Any]:
    """Arguments of the operator: packed slices of these many rows each, every other token with the adapter."""
    generator = torch.Generator().manual_seed(len(sizes) + tokens)
    base, extra = sum(sizes), rank * len(sizes)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    return {
        "x": draw(tokens, width),
        "full": torch.cat([draw(base + extra, width), torch.zeros(5, width)]),
        "b": draw(base, rank),
        "bias": draw(base) if bias else None,
        "token_slots": torch.tensor([0, -1] * tokens, dtype=torch.int32),
        "active_slots": torch.tensor([-1, 0], dtype=torch.int32),
        "no_adapter": None,
        "starts": [sum(sizes[:number]) for number in range(1, len(sizes))],
    }


def by_hand(given: dict[str, Any]) -> Any:
    """Slice by slice and token by token."""
    x, full, b = given["x"], given["full"], given["b"]
    (base, rank), edges = b.shape, [0, *given["starts"], b.shape[0]]
    rows = []
    for token, slot in zip(x, given["token_slots"].tolist(), strict=False):
        y = full[:base] @ token + (0 if given["bias"] is None else given["bias"])
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            if slot >= 0:
                y[start:stop] += b[start:stop] @ (full[base + number * rank :][:rank] @ token)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("sizes", [[12], [8, 8], [12, 4, 4]])
@pytest.mark.parametrize("bias", [True, False])
def test_each_slice_has_an_adapter_of_its_own_and_each_token_its_choice(sizes: list[int], bias: bool) -> None:
    given = layer(sizes, tokens=5, bias=bias)
    found = linear.operator()(*given.values())
    assert found.is_contiguous()
    torch.testing.assert_close(found, by_hand(given))


@pytest.mark.parametrize(
    "none",
    [
        {"token_slots": torch.full((8,), -1, dtype=torch.int32)},
        # As vLLM leaves them for a batch without adapters: the tokens' slots are those of the batch before.
        {"active_slots": torch.tensor([-1, -1], dtype=torch.int32)},
    ],
)
def test_a_batch_without_the_adapter_is_the_base_layer_to_the_bit(none: dict[str, Any]) -> None:
    given = {**layer([12], tokens=4), **none}
    right = torch.nn.functional.linear(given["x"], given["full"][:12], given["bias"])
    assert torch.equal(linear.operator()(*given.values()), right)


def test_what_lies_in_the_rows_of_other_tokens_does_not_matter() -> None:
    given = layer([12], tokens=4)
    given["full"][12:] = float("nan")
    found = linear.operator()(*given.values())
    assert found[1::2].isfinite().all()


def test_an_adapter_that_is_no_number_does_not_matter_to_tokens_without_it() -> None:
    given = layer([12, 4], tokens=4)
    given["b"][:] = float("nan")
    found = linear.operator()(*given.values())
    assert found[1::2].isfinite().all()
    assert not found[::2].isfinite().any()


def test_the_operator_is_well_formed() -> None:
    given = layer([8, 8], tokens=4)
    torch.library.opcheck(linear.operator(), tuple(given.values()))
