from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from trlpatch.policy.adapter import base_of, lora_view, unwrap  # noqa: E402
from trlpatch.policy.adapter_tensors import adapter_tensors  # noqa: E402
from trlpatch.policy.change_detection import fingerprint  # noqa: E402

pytestmark = pytest.mark.torch


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel, DataParallel and DeepSpeedEngine keep the model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, torch.compile, lambda m: Wrapper(torch.compile(m))])
def test_the_model_is_found_under_wrappers(wrap: Any) -> None:
    model = lora_model()
    assert unwrap(wrap(model)) is model
    assert base_of(wrap(model)) is model.get_base_model()
    view = lora_view(wrap(model))
    assert view is not None
    assert view.active == ("default",)
    assert len(view.layers) == 6


def test_a_model_without_an_adapter_has_no_view() -> None:
    assert lora_view(base_model()) is None
    assert lora_view("some/model") is None
    assert lora_view(None) is None
    assert lora_view(lora_model().merge_and_unload()) is None


def test_adapters_that_transformers_added_itself_are_seen() -> None:
    from peft import LoraConfig

    model = base_model()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    view = lora_view(model)
    assert view is not None
    assert len(view.pairs(view.active[0])) == 2


def test_keys_are_those_of_a_saved_peft_adapter() -> None:
    from peft import get_peft_model_state_dict

    model = lora_model()
    view = lora_view(model)
    assert view is not None
    saved = get_peft_model_state_dict(model)
    ours = adapter_tensors(view.weights("default")).tensors
    assert set(ours) == set(saved)
    assert {name: tuple(t.shape) for name, t in ours.items()} == {name: tuple(t.shape) for name, t in saved.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"lora_alpha": 4},
        {"rank_pattern": {"q_proj": 2, "o_proj": 7}, "alpha_pattern": {"v_proj": 40}},
    ],
)
def test_scaling_and_ranks_are_folded_into_the_copies(changes: dict[str, Any]) -> None:
    model = lora_model(**changes)
    randomize(model)
    view = lora_view(model)
    assert view is not None
    adapter = adapter_tensors(view.weights("default"))
    for path, layer in view.layers:
        a = adapter.tensors[f"base_model.model.{path}.lora_A.weight"]
        b = adapter.tensors[f"base_model.model.{path}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == adapter.rank
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4, 8])
def test_copies_never_alias_the_training_weights(dtype: Any, alpha: int) -> None:
    model = lora_model(lora_alpha=alpha).to(dtype)
    randomize(model)
    view = lora_view(model)
    assert view is not None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for tensor in adapter_tensors(view.weights("default")).tensors.values():
        tensor.mul_(3.0)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def layers(model: Any) -> list[tuple[str, Any]]:
    view = lora_view(model)
    assert view is not None
    return list(view.layers)


def walk(model: Any) -> Any:
    view = lora_view(model)
    assert view is not None
    return view.found


def test_a_model_is_walked_once() -> None:
    model = lora_model()
    first, weights = walk(model), walk(model).weights("default")
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()  # slices its ModuleList of layers
    model.get_base_model().model.layers[:1]
    torch.nn.Sequential(torch.nn.Linear(1, 1))
    torch.compile(model)
    lora_model().get_base_model().model.layers.append(torch.nn.Linear(1, 1))
    assert walk(model) is first
    assert walk(model).weights("default") is weights


def attribute(model: Any) -> None:
    model.get_base_model().model.layers[0].more = torch.nn.Linear(1, 1)


def added(model: Any) -> None:
    model.get_base_model().model.layers[0].add_module("more", torch.nn.Linear(1, 1))


def dictionary_item(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["more"] = torch.nn.Linear(1, 1)


def list_item(model: Any) -> None:
    model.get_base_model().model.layers.append(torch.nn.Linear(1, 1))


def built_elsewhere(model: Any) -> None:
    more = torch.nn.Sequential()
    more.append(lora_model().get_base_model().model.layers[0])
    model.get_base_model().model.more = more


def grown_later(model: Any) -> None:
    """A container that became part of the model after it was walked first."""
    more = torch.nn.Sequential()
    model.get_base_model().model.more = more
    walk(model)
    more.append(lora_model().get_base_model().model.layers[0])


@pytest.mark.parametrize("change", [attribute, added, dictionary_item, list_item, built_elsewhere, grown_later])
def test_what_is_registered_inside_the_model_is_walked_again(change: Any) -> None:
    model = lora_model()
    others, first = walk(lora_model()), walk(model)
    before = len(first.layers)
    change(model)
    assert walk(model) is not first
    assert len(walk(model).layers) == before + (3 if change in (built_elsewhere, grown_later) else 0)
    assert others.is_current()


def replaced_block(model: Any) -> None:
    layers = model.get_base_model().model.layers
    layers[1] = lora_model(target_modules=["q_proj"]).get_base_model().model.layers[1]


def deleted_block(model: Any) -> None:
    del model.get_base_model().model.layers[0]


def inserted_block(model: Any) -> None:
    layers = model.get_base_model().model.layers
    layers.insert(0, layers[1])


def bare_dictionary(model: Any) -> None:
    attention = model.get_base_model().model.layers[0].self_attn
    attention._modules["q_proj"] = attention.q_proj.base_layer


def new_target(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter("more", LoraConfig(r=2, target_modules=["k_proj"]))


@pytest.mark.parametrize("change", [replaced_block, deleted_block, inserted_block, bare_dictionary, new_target])
def test_what_changes_the_layers_is_noticed(change: Any) -> None:
    model = lora_model()
    before = layers(model)
    change(model)
    found = layers(model)
    assert found != before
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    assert found == [item for item in base.named_modules() if isinstance(item[1], BaseTunerLayer)]


def test_the_active_adapter_and_its_weights_are_those_of_this_moment() -> None:
    model = lora_model()
    model.add_adapter("other", model.peft_config["default"])
    view = lora_view(model)
    assert view is not None
    assert view.active == ("default",)
    view.weights("other")
    model.set_adapter("other")
    assert view.active == ("other",)
    model.base_model.set_adapter(["default", "other"])
    assert view.active == ("default", "other")
    view.layers[0][1].set_adapter("other")
    assert view.active == ("other", "default")
    model.set_adapter("other")
    model.delete_adapter("other")
    assert view.active == ("default",)
    assert view.weights("other").paths == ()
    view.layers[0][1].merge()
    assert view.merged


@pytest.mark.parametrize("change", ["address", "parameter", "scaling"])
def test_weights_are_others_when_they_are_elsewhere(change: str) -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    before = view.weights("default")
    randomize(model)
    assert view.weights("default") is before
    layer = view.layers[0][1]
    if change == "address":
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.clone()
    elif change == "parameter":
        layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.data)
    else:
        layer.scaling["default"] = 3.0
    after = view.weights("default")
    assert after is not before
    assert after.a[0] is layer.lora_A["default"].weight
    assert after.scalings[0] == layer.scaling["default"]


def test_a_scaling_that_peft_replaces_is_seen() -> None:
    """`rescale_adapter_scale` gives every layer another dictionary, and the first one back."""
    from peft.helpers import rescale_adapter_scale

    model = lora_model()
    view = lora_view(model)
    assert view is not None
    before = fingerprint(view)
    with rescale_adapter_scale(model, 0.5):
        assert view.weights("default").scalings == [1.0] * 6
        assert fingerprint(view) != before
    assert view.weights("default").scalings == [2.0] * 6
    assert fingerprint(view) == before
    view.layers[0][1].scaling["default"] = 7.0
    assert view.weights("default").scalings[0] == 7.0


def test_a_snapshot_says_what_was() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    before, untouched = view.snapshot(), view.snapshot()
    assert (before.active, before.disabled, before.merged) == (("default",), False, False)
    weights = before.weights("default")
    with model.disable_adapter():
        view.layers[0][1].scaling["default"] = 7.0
        assert (before.disabled, view.disabled, before.snapshot().disabled) == (False, True, True)
        assert untouched.disabled, "asked for the first time"
        assert before.weights("default") is weights
        assert view.weights("default").scalings[0] == 7.0


def test_layers_that_say_what_their_class_says_are_asked() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    layer = view.layers[0][1]
    vars(layer).pop("_disable_adapters")
    vars(layer).pop("merged_adapters")
    assert (view.disabled, view.merged, view.active) == (False, False, ("default",))


def test_a_model_is_not_kept_alive() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    fingerprint(view)
    gone = weakref.ref(view.base)
    del model, view
    gc.collect()
    assert gone() is None
