from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402
from trlpatch.policy.base_weights import base_mark, changed_since, weights_now  # noqa: E402

pytestmark = pytest.mark.cpu

Q = "model.layers.0.self_attn.q_proj"


def test_the_weights_of_a_model_are_the_same_with_an_adapter_on_it() -> None:
    base = base_model()
    before = weights_now(base)
    model = lora_model(base)
    randomize(model)
    assert weights_now(base) == before
    assert (before[Q].dtype, before[Q].shape) == (torch.float32, (16, 16))


def test_merged_weights_are_left_out_while_they_are_merged() -> None:
    base = base_model()
    before = weights_now(base)
    model = lora_model(base)
    randomize(model)
    model.merge_adapter()
    assert before.keys() - weights_now(base).keys() >= {Q}
    assert "model.layers.0.self_attn.k_proj" in weights_now(base)


def test_one_bit_of_an_adapted_weight_is_a_change() -> None:
    base = base_model()
    before, view = weights_now(base), lora_view(lora_model(base))
    assert view is not None
    assert changed_since(None, view) is None
    assert changed_since(before, view) is None
    with torch.no_grad():
        weight = base.get_submodule(Q).base_layer.weight
        weight.view(torch.int32)[0, 0] += 1
    assert changed_since(before, view) == f"the base weight of {Q!r} is not the one that the engine was attached with"


def test_another_dtype_is_no_change() -> None:
    base = base_model()
    before = weights_now(base)
    view = lora_view(lora_model(base.to(torch.bfloat16)))
    assert view is not None
    assert changed_since(before, view) is None


def test_a_base_weight_in_the_place_of_another_moves_the_mark() -> None:
    """`accelerate` puts parameters into the dictionary of their module, which no hook of torch's tells."""
    base = base_model()
    view = lora_view(lora_model(base))
    assert view is not None
    before = base_mark(view)
    assert base_mark(view) == before
    own = base.get_submodule(Q).base_layer._parameters
    own["weight"] = torch.nn.Parameter(own["weight"].detach() * 2, requires_grad=False)
    assert base_mark(view) != before
