"""What would change or move shared base weights raises before it has done anything."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from trlpatch.engine.attach import save_lora  # noqa: E402
from trlpatch.engine.sharing import check_frozen, protect, unprotect  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, SharedWeights  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def base() -> Iterator[Any]:
    model = base_model().requires_grad_(False)
    protect(model)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    yield model
    now = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters()}
    for name, (address, value) in before.items():
        assert now[name].data_ptr() == address, f"{name} was moved"
        assert torch.equal(now[name], value), f"{name} was changed"
    unprotect(model)


MOVES = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "to(device)": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("wrapped", ["plain", "peft", "peft in a container"])
def test_conversions_are_refused(base: Any, move: str, wrapped: str) -> None:
    model = base if wrapped == "plain" else lora_model(base)
    if wrapped == "peft in a container":
        model = torch.nn.Sequential(model)
    with pytest.raises(
        SharedWeights, match=r"are the engine's own memory, torch\.float32 on cpu; .* nothing was moved"
    ):
        MOVES[move](model)


def test_conversions_that_change_nothing_for_the_base_pass(base: Any) -> None:
    policy = lora_model(base)
    for layer in policy.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A.bfloat16()
    assert policy.to("cpu") is policy
    assert policy.cpu() is policy
    policy.to(torch.float32)  # what it is, but for some adapter weights
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("before", [True, False], ids=["peft before", "peft after"])
@pytest.mark.parametrize("operation", ["merge_adapter", "unmerge_adapter", "merge_and_unload"])
def test_merges_are_refused(before: bool, operation: str) -> None:
    base = base_model().requires_grad_(False)
    policy = lora_model(base) if before else None
    protect(base)
    policy = lora_model(base) if policy is None else policy
    randomize(policy)
    weights = copy.deepcopy(policy.state_dict())
    with pytest.raises(SharedWeights, match=r"save the adapter with model\.save_lora\(directory\)"):
        getattr(policy, operation)()
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    assert not any(getattr(layer, "merged", False) for layer in policy.modules())
    ids = torch.arange(8)[None]
    policy(ids).logits.sum().backward()
    with policy.disable_adapter():
        policy(ids)
    unprotect(policy)
    policy.merge_adapter()


def test_adapters_can_be_exchanged(base: Any) -> None:
    policy = lora_model(base)
    policy.add_adapter("second", peft.LoraConfig(r=2, target_modules=["gate_proj"]))
    for layer in ("q_proj", "gate_proj"):
        path = f"base_model.model.model.layers.0.{'mlp' if layer == 'gate_proj' else 'self_attn'}.{layer}"
        with pytest.raises(SharedWeights):
            policy.get_submodule(path).merge()
    policy.delete_adapter("second")
    assert policy.unload() is base
    with pytest.raises(SharedWeights):
        lora_model(base, target_modules=["down_proj"]).merge_and_unload()


def test_base_weights_in_a_state_dict_are_refused_and_an_adapters_pass(base: Any) -> None:
    policy = lora_model(base)
    randomize(policy)
    adapter = peft.get_peft_model_state_dict(policy)
    peft.set_peft_model_state_dict(policy, adapter)
    whole = copy.deepcopy(policy.state_dict())
    for model, state in ((policy, whole), (base, base.state_dict())):
        with pytest.raises(SharedWeights, match=r"would overwrite base weights"):
            model.load_state_dict(state)


def test_resizing_is_refused(base: Any) -> None:
    base.resize_token_embeddings(64)
    with pytest.raises(SharedWeights, match="64 tokens; expected to stay so, found 65"):
        base.resize_token_embeddings(65)


def test_a_trainable_base_weight_is_named(base: Any) -> None:
    policy = lora_model(base)
    check_frozen(policy)
    weight = policy.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.base_layer").weight
    weight.requires_grad_(True)
    with pytest.raises(SharedWeights, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight' has requires_grad=True"):
        check_frozen(policy)
    weight.requires_grad_(False)


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_rewrite_the_base_are_refused(base: Any, way: str) -> None:
    """PEFT rewrites a float32 base in place for OLoRA, and puts another one there otherwise."""
    with pytest.raises(SharedWeights, match=r"init_lora_weights='(pissa|olora)': .* nothing was changed"):
        lora_model(base, init_lora_weights=way)


def test_a_replaced_base_weight_is_named() -> None:
    base = base_model().requires_grad_(False)
    protect(base)
    check_frozen(policy := lora_model(base))
    layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    layer.weight.data = layer.weight.data.clone()
    with pytest.raises(SharedWeights, match=r"q_proj\.weight' was replaced after sharing"):
        check_frozen(policy)
    unprotect(base)
    check_frozen(policy)


def test_a_deep_copy_is_free(base: Any) -> None:
    twin = copy.deepcopy(lora_model(base))
    randomize(twin)
    twin.merge_adapter()
    twin.unmerge_adapter()
    twin.half()
    twin.get_base_model().resize_token_embeddings(70)
    twin.load_state_dict(twin.state_dict())
    twin.requires_grad_(True)
    check_frozen(twin)
    assert twin.get_base_model().get_input_embeddings().weight.shape[0] == 70


def test_protection_is_lifted_completely_and_keeps_nothing_alive() -> None:
    from torch.nn.modules.module import _global_module_registration_hooks as hooks

    gc.collect()
    protect(unprotected := base_model())
    unprotect(unprotected)  # with it goes a hook that models of other tests have left behind
    before = dict(hooks)
    base = base_model().requires_grad_(False)
    attributes = set(base.__dict__)
    protect(base)
    protect(base)
    assert len(hooks) == len(before) + 1
    policy = lora_model(base)
    unprotect(policy)
    unprotect(policy)
    assert dict(hooks) == before
    assert not any(name in layer.__dict__ for layer in policy.modules() for name in ("merge", "unmerge"))
    policy.merge_and_unload().half()
    assert set(base.__dict__) - attributes <= {"peft_config"}
    protect(other := base_model())
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    protect(base)
    unprotect(base)
    assert dict(hooks) == before


def test_a_saved_adapter_is_pefts(base: Any, tmp_path: Path) -> None:
    policy = lora_model(base, r=3)
    policy.add_adapter("second", peft.LoraConfig(r=2, target_modules=["gate_proj"]))
    randomize(policy)
    for name, folder in ((None, "default"), ("second", "second")):
        save_lora(base, tmp_path / folder, name)
        policy.save_pretrained(tmp_path / "peft", selected_adapters=[folder])
        theirs = tmp_path / "peft" / ("second" if name else "")
        fresh = peft.PeftModel.from_pretrained(base_model(), tmp_path / folder)
        expected = peft.PeftModel.from_pretrained(base_model(), theirs)
        ids = torch.arange(8)[None]
        assert torch.equal(fresh(ids).logits, expected(ids).logits)
        ours = {path.name for path in (tmp_path / folder).iterdir()}
        assert ours == {"adapter_config.json", "adapter_model.safetensors"}
        mine, peft_own = (
            json.loads((where / "adapter_config.json").read_text()) for where in (tmp_path / folder, theirs)
        )
        assert {key for key in mine if mine[key] != peft_own[key]} <= {"base_model_name_or_path", "auto_mapping"}
    with pytest.raises(ValueError, match="this model has default, second"):
        save_lora(base, tmp_path, "third")
    with pytest.raises(AdapterNotExpressible, match="has no PEFT adapter to save"):
        save_lora(base_model(), tmp_path)


PARTS = {
    "a layer": lambda model: model.model.layers[0],
    "a linear": lambda model: model.model.layers[1].self_attn.q_proj,
    "the decoder": lambda model: model.model,
    "the head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_parts_of_the_model_are_no_way_around(base: Any, part: str, wrapped: bool) -> None:
    if wrapped:
        lora_model(base)
    inner = PARTS[part](base)
    with pytest.raises(SharedWeights, match="nothing was moved"):
        inner.to(torch.bfloat16)
    state = {name: torch.zeros_like(value) for name, value in inner.state_dict().items()}
    with pytest.raises(SharedWeights, match="would overwrite base weights"):
        inner.load_state_dict(state)
    inner.to(torch.float32)
    inner.load_state_dict({name: value for name, value in state.items() if "lora_" in name}, strict=False)


def test_a_copys_parts_are_its_own(base: Any) -> None:
    twin = copy.deepcopy(base)
    twin.model.layers[0].to(torch.bfloat16)
    twin.lm_head.load_state_dict({"weight": torch.zeros_like(twin.lm_head.weight)})
    assert twin.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
