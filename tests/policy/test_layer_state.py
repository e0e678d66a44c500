"""A look at the layers is the last one again as long as nothing has moved, and a new one as soon as anything has."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import lora_model, randomize  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402
from trlpatch.policy.layer_state import Contents  # noqa: E402

pytestmark = pytest.mark.torch


def look(model: Any) -> Any:
    view = lora_view(model)
    assert view is not None
    return view.found.look()


def layer(model: Any, number: int = 3) -> Any:
    view = lora_view(model)
    assert view is not None
    return view.layers[number][1]


def test_training_and_forward_passes_leave_the_look_as_it_is() -> None:
    model = lora_model()
    before = look(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    randomize(model)
    assert look(model) is before
    assert (before.active, before.disabled, before.merged) == (("default",), False, False)


def data(model: Any) -> None:
    layer(model).lora_B["default"].weight.data = layer(model).lora_B["default"].weight.data.clone()


def parameter(model: Any) -> None:
    layer(model).lora_A["default"].weight = torch.nn.Parameter(layer(model).lora_A["default"].weight.data)


def parameter_behind_the_back(model: Any) -> None:
    own = layer(model).lora_A["default"]._parameters
    own["weight"] = torch.nn.Parameter(own["weight"].data)


def linear_behind_the_back(model: Any) -> None:
    sides = layer(model).lora_A._modules
    sides["default"] = torch.nn.Linear(16, 4, bias=False)


def scaling(model: Any) -> None:
    layer(model).scaling["default"] = 3.0


def scalings(model: Any) -> None:
    layer(model).scaling = {**layer(model).scaling, "default": 3.0}


def the_same_scalings_elsewhere(model: Any) -> None:
    layer(model).scaling = dict(layer(model).scaling)


def scaling_of_an_equal_dictionary(model: Any) -> None:
    the_same_scalings_elsewhere(model)
    look(model)
    scaling(model)


def merged_in_an_equal_list(model: Any) -> None:
    layer(model).merged_adapters = []
    look(model)
    layer(model).merged_adapters.append("default")


def scaling_added(model: Any) -> None:
    layer(model).scaling["other"] = 1.0


def switch(model: Any) -> None:
    layer(model)._disable_adapters = True


def activated(model: Any) -> None:
    layer(model)._active_adapter = ["default", "other"]


def activated_in_place(model: Any) -> None:
    layer(model)._active_adapter.append("other")


def merged(model: Any) -> None:
    layer(model).merge()


def deleted(model: Any) -> None:
    del layer(model).lora_A["default"]


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        data,
        parameter,
        parameter_behind_the_back,
        linear_behind_the_back,
        scaling,
        scalings,
        scaling_of_an_equal_dictionary,
        switch,
        activated,
        activated_in_place,
        merged,
        merged_in_an_equal_list,
        scaling_added,
        deleted,
        cast,
    ],
)
def test_whatever_moves_is_looked_at_again(change: Any) -> None:
    model = lora_model()
    for one in model.modules():
        if isinstance(getattr(one, "_active_adapter", None), str):
            one._active_adapter = [one._active_adapter]
    before = look(model)
    assert look(model) is before
    change(model)
    after = look(model)
    assert after is not before
    view = lora_view(model)
    assert view is not None
    assert (after.active, after.switches, after.merged) == (view.active, view.switches, view.merged)
    if len(after.active) == 1:
        assert after.weights is view.weights("default")
        assert after.weights.scalings == [one.scaling["default"] for _, one in view.layers if "default" in one.lora_A]


def test_in_place_changes_of_new_containers_are_seen() -> None:
    """An equal dictionary in the place of another one is the one to watch from then on."""
    model = lora_model()
    look(model)
    the_same_scalings_elsewhere(model)
    look(model)
    scaling(model)
    assert look(model).weights.scalings[3] == 3.0


def test_an_address_that_was_looked_at_is_not_given_away() -> None:
    """Else a parameter of another dtype could come to it, which the addresses alone would not tell."""
    model = lora_model()
    storage = torch.UntypedStorage
    before = layer(model).lora_A["default"].weight.untyped_storage()._weak_ref()
    look(model)
    cast(model)
    gc.collect()
    assert not storage._expired(before)
    look(model)
    gc.collect()
    assert storage._expired(before)
    storage._free_weak_ref(before)


def test_layers_that_keep_things_elsewhere_are_asked_each_time() -> None:
    model = lora_model()
    vars(layer(model)).pop("_disable_adapters")
    before = look(model)
    assert before.guard is None
    assert look(model) is not before
    assert look(model).switches == before.switches


def test_several_active_adapters_are_asked_each_time() -> None:
    model = lora_model()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert look(model).active == ("default", "other")
    assert look(model).weights is None
    model.set_adapter("other")
    assert look(model) is look(model)


def test_a_model_that_was_looked_at_is_not_kept_alive() -> None:
    model = lora_model()
    look(model)
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None


def test_contents_are_told_by_identity_and_order() -> None:
    one, two = [], []  # type: ignore[var-annotated]
    assert one == two
    table, things = {"a": one}, [one, two]
    contents = Contents([table, things, table])
    assert contents.are_the_same()
    table["a"] = two
    assert not contents.are_the_same()
    table["a"] = one
    assert contents.are_the_same()
    things.reverse()
    assert not contents.are_the_same()
    things.reverse()
    things.append(one)
    assert not contents.are_the_same()


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("other", ["equal", "tensor", "module", "none"])
def test_an_equal_tensor_in_the_place_of_another_is_another_content(size: int, other: str) -> None:
    """`==` is true of two tensors of one element that are equal, and an error for longer ones."""
    weight = torch.nn.Parameter(torch.ones(size))
    others = {"equal": weight.detach().clone(), "tensor": torch.ones(3), "module": torch.nn.Identity(), "none": None}
    table = {"weight": weight, "bias": None, "beside": torch.nn.Parameter(torch.ones(4))}
    contents = Contents([table])
    assert contents.are_the_same()
    table["weight"] = others[other]
    assert not contents.are_the_same()
    table["weight"] = weight
    assert contents.are_the_same()
    table["bias"] = weight
    assert not contents.are_the_same()


class Agreeable(torch.nn.Parameter):
    """A parameter that is equal to whatever it is compared with."""

    def __eq__(self, other: object) -> Any:
        return True

    __hash__ = torch.nn.Parameter.__hash__


def test_classes_with_an_equality_of_their_own_are_told_by_identity() -> None:
    for one, two in (([], []), (Agreeable(torch.ones(3)), Agreeable(torch.zeros(3)))):
        table: dict[str, Any] = {"weight": one}
        contents = Contents([table])
        table["weight"] = two
        assert not contents.are_the_same()


def test_each_layer_is_held_to_what_it_said_itself() -> None:
    """One that comes to say what the others have said all along has changed."""
    model = lora_model(alpha_pattern={"v_proj": 2})
    before = look(model)
    assert look(model) is before
    scalings = before.weights.scalings
    assert len(set(scalings)) == 2
    other = next(number for number, scaling in enumerate(scalings) if scaling != scalings[0])
    layer(model, other).scaling["default"] = scalings[0]
    after = look(model)
    assert after is not before
    assert after.weights.scalings[other] == scalings[0]
