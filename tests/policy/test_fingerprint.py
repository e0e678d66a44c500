"""Fingerprints of adapters: every way in which a weight, a scaling or what is active can move shows in them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import lora_model, randomize  # noqa: E402
from trlpatch.policy.adapter import LoraView, lora_view  # noqa: E402
from trlpatch.policy.change_detection import fingerprint  # noqa: E402

pytestmark = pytest.mark.torch


def view_of(model: Any) -> LoraView:
    view = lora_view(model)
    assert view is not None
    return view


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_step_moves_the_fingerprint(settings: dict[str, bool]) -> None:
    model = lora_model()
    view = view_of(model)
    before = fingerprint(view)
    assert fingerprint(view) == before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **settings)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert fingerprint(view) == before
    optimizer.step()
    assert fingerprint(view) != before


def test_scaling_and_the_active_adapter_are_part_of_the_fingerprint() -> None:
    model = lora_model()
    view = view_of(model)
    before = fingerprint(view)
    view.layers[0][1].scaling["default"] *= 2
    assert fingerprint(view) != before
    view.layers[0][1].scaling["default"] /= 2
    assert fingerprint(view) == before
    with model.disable_adapter():
        assert view.disabled
        assert fingerprint(view) != before


def test_writes_that_torch_does_not_count_are_seen() -> None:
    model = lora_model()
    view = view_of(model)
    before = fingerprint(view)
    _, a, _, _ = view.pairs("default")[0]
    counted = a._version
    a.data[0, 0] += 1e-6
    assert a._version == counted
    assert fingerprint(view) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_without_version_counters(dtype: Any) -> None:
    with torch.inference_mode():
        model = lora_model().to(dtype)
        view = view_of(model)
        before = fingerprint(view)
        assert fingerprint(view) == before
        randomize(model)
        assert fingerprint(view) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_that_cancel_out_are_seen(dtype: Any) -> None:
    model = lora_model().to(dtype)
    view = view_of(model)
    before = fingerprint(view)
    _, a, _, _ = view.pairs("default")[0]
    bits = a.detach().view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[0, 0] += 1
    bits[0, 1] -= 1
    assert fingerprint(view) != before
    bits[0, 0] -= 1
    bits[0, 1] += 1
    assert fingerprint(view) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1, 2**4])
def test_a_rectangle_of_moves_that_cancel_out_is_seen(dtype: Any, distance: int) -> None:
    """+d -d over -d +d leaves the sum of every row and of every column as it was, whatever the rows' length."""
    model = lora_model().to(dtype)
    view = view_of(model)
    before = fingerprint(view)
    _, a, _, _ = view.pairs("default")[0]
    bits = a.detach().view(torch.int32 if dtype == torch.float32 else torch.int16)
    for width in (16, 8, 4):
        rows = bits.view(-1, width)
        for sign in (1, -1):
            for row, column, way in ((0, 1, 1), (0, 3, -1), (2, 1, -1), (2, 3, 1)):
                rows[row, column] += sign * way * distance
            assert (fingerprint(view) == before) is (sign == -1)


def test_large_adapters_are_summed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces share one buffer, and weights of two dtypes and one larger than a piece are among them."""
    from trlpatch.policy import change_detection as module

    monkeypatch.setattr(module, "_CHUNK", 40)
    model = lora_model()
    randomize(model)
    view = view_of(model)
    weights = view.weights("default")
    weights.b[2].data = weights.b[2].data.bfloat16()
    weights.a[1].data = weights.a[1].data.t().contiguous().t()
    before = fingerprint(view)
    assert fingerprint(view) == before
    for parameter in (*weights.a, *weights.b):
        elements = parameter.data if not parameter.is_contiguous() else parameter.data.view(-1)
        for where in (0, -1):
            old = elements[where].clone()
            elements[where] += 1
            assert fingerprint(view) != before
            elements[where] = old
            assert fingerprint(view) == before
