"""The CUDA kernel of single-adapter layers against the operator's own definition in torch, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trlpatch.engine.single_adapter.linear import _on_cpu, operator  # noqa: E402

pytestmark = pytest.mark.gpu


def arguments(sizes: list[int], tokens: int, rank: int, dtype: Any, *, bias: bool, width: int = 256) -> list[Any]:
    """Every fifth token is without the adapter; the rows of A are padded to a multiple of 64."""
    generator = torch.Generator("cuda").manual_seed(tokens + rank)
    base, extra = sum(sizes), rank * len(sizes)

    def draw(*shape: int, size: float = 1.0) -> Any:
        return (torch.randn(*shape, generator=generator, device="cuda") * size).to(dtype)

    full = torch.zeros(base + extra + -(base + extra) % 64, width, dtype=dtype, device="cuda")
    full[: base + extra] = draw(base + extra, width, size=width**-0.5)
    slots = torch.zeros(tokens + 3, dtype=torch.int32, device="cuda")
    slots[::5] = -1
    return [
        draw(tokens, width),
        full,
        draw(base, rank, size=rank**-0.5),
        draw(base) if bias else None,
        slots,
        torch.tensor([-1, 0], dtype=torch.int32, device="cuda"),
        torch.tensor([False]),
        [sum(sizes[:number]) for number in range(1, len(sizes))],
    ]


@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 200, 2048])
@pytest.mark.parametrize("rank", [8, 16, 64, 320])
@pytest.mark.parametrize("sizes", [[512], [256, 256], [512, 128, 128]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_computes_what_the_definition_says(sizes: list[int], rank: int, tokens: int, dtype: str) -> None:
    given = arguments(sizes, tokens, rank, getattr(torch, dtype), bias=rank != 64)
    found = operator()(*given)
    right = _on_cpu(*[part.double() if torch.is_tensor(part) and part.is_floating_point() else part for part in given])
    assert found.is_contiguous()
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    assert float((found.double() - right).abs().max()) < tolerance * float(right.abs().max())


def test_no_adapter_in_the_batch_is_the_base_layer_to_the_bit() -> None:
    given = arguments([512], 64, 16, torch.bfloat16, bias=True)
    right = torch.nn.functional.linear(given[0], given[1][:512], given[3])
    given[6] = torch.tensor([True])
    assert torch.equal(operator()(*given), right)


def test_an_adapter_that_is_no_number_is_not_in_tokens_without_it() -> None:
    given = arguments([512, 128, 128], 64, 16, torch.bfloat16, bias=True)
    given[2].fill_(float("nan"))
    found = operator()(*given)
    assert found[::5].isfinite().all()
    given[5].fill_(-1)
    assert operator()(*given).isfinite().all()


def test_a_captured_graph_follows_the_batch() -> None:
    """Replays read what vLLM writes before each step: the slots, and for a batch without adapters the active ones."""
    given = arguments([512, 128, 128], 64, 16, torch.bfloat16, bias=True)
    operator()(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator()(*given)
    for slots, active in (([0, -1], [-1, 0]), ([-1, 0], [-1, 0]), ([0, 0], [0, -1]), ([0, 0], [-1, -1])):
        given[4][:64] = torch.tensor(slots, dtype=torch.int32, device="cuda").repeat(32)
        given[5].copy_(torch.tensor(active, dtype=torch.int32))
        graph.replay()
        eager = operator()(*given)
        assert torch.equal(captured, eager)
        base = torch.nn.functional.linear(given[0].float(), given[1][:768].float(), given[3].float())
        moved = (eager.float() - base).abs().amax(dim=1) > 0.1
        has = (given[4][:64] >= 0) & bool((given[5] >= 0).any())
        assert torch.equal(moved, has)
