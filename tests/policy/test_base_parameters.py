"""Base parameters: what is trained beside the adapter, or has taken another's place, is noticed at the next look."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import lora_model  # noqa: E402
from trlpatch.policy.adapter import LoraView, lora_view  # noqa: E402
from trlpatch.policy.base_parameters import beside_mark, trained_parameter  # noqa: E402

pytestmark = pytest.mark.torch

NORM, ADAPTED, ALONE = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


def view_of(model: Any) -> LoraView:
    view = lora_view(model)
    assert view is not None
    return view


def owner(model: Any, path: str) -> Any:
    module = model.get_base_model().get_submodule(path.rpartition(".")[0])
    return getattr(module, "base_layer", module)


@pytest.mark.parametrize("path", [NORM, ADAPTED, ALONE])
@pytest.mark.parametrize("how", ["flag", "parameter", "behind the back"])
def test_a_parameter_that_is_trained_is_named(path: str, how: str) -> None:
    model = lora_model()
    assert trained_parameter(view_of(model)) is None
    snapshot = view_of(model).snapshot()
    assert trained_parameter(snapshot) is None
    module = owner(model, path)
    before = module.weight
    if how == "flag":
        before.requires_grad_(True)
    elif how == "parameter":
        module.weight = torch.nn.Parameter(before.detach())
    else:
        module._parameters["weight"] = torch.nn.Parameter(before.detach())
    assert trained_parameter(view_of(model)) == path
    assert trained_parameter(view_of(model).snapshot()) == path
    module._parameters["weight"] = before.requires_grad_(False)
    assert trained_parameter(view_of(model).snapshot()) is None


def test_a_parameter_that_is_taken_away_and_put_back_is_found() -> None:
    model = lora_model()
    assert trained_parameter(view_of(model)) is None
    own = owner(model, NORM)._parameters
    weight = own.pop("weight")
    assert trained_parameter(view_of(model)) is None
    weight.requires_grad_(True)
    assert trained_parameter(view_of(model)) is None
    own["weight"] = weight
    assert trained_parameter(view_of(model)) == NORM


def test_one_in_the_place_of_another_moves_the_mark() -> None:
    """An equal one, too: what is written to the new one moves nothing of the old one."""
    model = lora_model()
    before = beside_mark(view_of(model).snapshot())
    assert beside_mark(view_of(model).snapshot()) == before
    own = owner(model, NORM)._parameters
    own["weight"] = torch.nn.Parameter(own["weight"].detach().clone(), requires_grad=False)
    after = beside_mark(view_of(model).snapshot())
    assert after != before
    with torch.no_grad():
        own["weight"].mul_(2)
    assert beside_mark(view_of(model).snapshot()) not in (before, after)
