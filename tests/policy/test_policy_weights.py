"""What each parameter of a policy is, against PEFT's own merge in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from tests.fakes.models import base_model, lora_model  # noqa: E402
from trlpatch.engine.weights_in_place.merge import float32_products, merged  # noqa: E402
from trlpatch.policy.bit_sums import bit_sums  # noqa: E402
from trlpatch.policy.content_mark import ContentMark  # noqa: E402
from trlpatch.policy.policy_weights import NotMergeable, policy_weights  # noqa: E402

pytestmark = pytest.mark.torch

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
}


def moved(model: Any, *, seed: int = 0) -> Any:
    """Change whatever is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def values(model: Any, **options: Any) -> dict[str, Any]:
    with torch.no_grad(), float32_products():
        return {one.path: merged(one, slice(None), torch.device("cpu")) for one in policy_weights(model, **options)}


def peft_merged(model: Any) -> dict[str, Any]:
    whole = copy.deepcopy(model).merge_and_unload()
    return dict(whole.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_peft_merges(kind: str) -> None:
    model = moved(lora_model(**KINDS[kind]))
    found, right = values(model), peft_merged(model)
    assert found.keys() == right.keys()
    for path, value in found.items():
        torch.testing.assert_close(value, right[path].detach(), rtol=1e-6, atol=1e-6, msg=path)
    base, before = values(model, adapters=False), dict(base_model().named_parameters())
    trained = {"bias"} if kind == "bias" else set()
    for path, value in base.items():
        assert torch.equal(value, before[path]) or path.rpartition(".")[2] in trained, path
    assert any(not torch.equal(value, before[path]) for path, value in found.items())


def test_a_model_without_peft_is_its_own_parameters() -> None:
    model = moved(base_model())
    weights = policy_weights(model)
    assert [one.path for one in weights] == [name for name, _ in model.named_parameters()]
    assert all(one.plain and one.base is parameter for one, parameter in zip(weights, model.parameters(), strict=True))


def test_a_disabled_adapter_adds_nothing_and_two_active_ones_both() -> None:
    model = moved(lora_model())
    with model.disable_adapter():
        assert all(one.plain for one in policy_weights(model))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(
        values(model)["model.layers.0.self_attn.q_proj.weight"],
        peft_merged(model)["model.layers.0.self_attn.q_proj.weight"].detach(),
    )


def test_merged_layers_are_taken_as_they_are() -> None:
    model = moved(lora_model())
    right = values(model)
    model.merge_adapter()
    assert all(one.plain for one in policy_weights(model))
    for path, value in values(model).items():
        torch.testing.assert_close(value, right[path])
    with pytest.raises(NotMergeable, match="an adapter is merged into"):
        policy_weights(model, adapters=False)


def _token_rows() -> Any:
    return lora_model(trainable_token_indices={"embed_tokens": [1, 2]})


def _loha() -> Any:
    return peft.get_peft_model(base_model(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))


def _prompt() -> Any:
    return peft.get_peft_model(base_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _sharded() -> Any:
    model = base_model()
    model.model.norm.weight.ds_id = 1
    return model


def _quantized() -> Any:
    model = base_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (_token_rows, "TrainableTokens"),
        (_loha, "loha"),
        (_prompt, "learns a prompt"),
        (_sharded, "ZeRO-3"),
        (_quantized, "kept as torch.uint8"),
    ],
)
def test_what_is_not_known_is_refused(build: Any, says: str) -> None:
    with pytest.raises(NotMergeable, match=says):
        policy_weights(build())


@pytest.mark.parametrize("build", [lambda: lora_model(use_dora=True, modules_to_save=["norm"]), base_model])
def test_the_mark_moves_with_whatever_is_trained(build: Any) -> None:
    model = build()
    before = ContentMark(policy_weights(model))
    assert before == ContentMark(policy_weights(model))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.detach().clone()
        parameter.data.view(-1)[-1] += 1.0  # moves no version counter
        assert before != ContentMark(policy_weights(model))
        parameter.data.copy_(kept)
    assert before == ContentMark(policy_weights(model))


@pytest.mark.parametrize("leaf", ["model.norm.weight", "model.layers.0.self_attn.q_proj.base_layer.weight"])
def test_the_mark_moves_with_what_is_written_to_frozen_parameters(leaf: str) -> None:
    model = lora_model(use_dora=True)
    frozen = model.get_base_model().get_parameter(leaf)
    assert not frozen.requires_grad
    before = ContentMark(policy_weights(model))
    frozen.data.mul_(2)  # moves no version counter
    assert before != ContentMark(policy_weights(model))
    frozen.data.div_(2)
    assert before == ContentMark(policy_weights(model))
    with torch.no_grad():
        frozen.view(-1)[0].mul_(1.5)
    assert before != ContentMark(policy_weights(model))
    with torch.inference_mode():
        weights = policy_weights(base_model().requires_grad_(False))
    assert ContentMark(weights) == ContentMark(weights), "inference tensors have no version"


def test_sums_that_a_model_keeps_are_those_of_the_tensors_it_has_now() -> None:
    model = lora_model(use_dora=True)
    base = model.get_base_model()
    layer = base.model.layers[0].self_attn.q_proj
    factor, frozen = layer.lora_B["default"].weight, layer.base_layer.weight
    before = ContentMark(policy_weights(model), base)
    first = factor.data
    factor.data = first.clone()
    assert before == ContentMark(policy_weights(model), base)
    factor.data.view(-1)[-1] += 1.0
    assert before != ContentMark(policy_weights(model), base)
    factor.data = first
    assert before == ContentMark(policy_weights(model), base)
    gone = StorageWeakRef(frozen.untyped_storage())
    model.to(torch.bfloat16)
    assert before != ContentMark(policy_weights(model), base)
    assert gone.expired(), "what is looked at holds the memory of weights that were cast"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_negated_column_is_seen(dtype: Any) -> None:
    whole = torch.rand(64, 64).add(0.1).to(dtype)
    before = bit_sums([whole])
    for column in range(8):
        whole[:, column] *= -1
        assert before != bit_sums([whole]), column
        whole[:, column] *= -1
    assert before == bit_sums([whole])


@pytest.mark.parametrize("size", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_element_of_a_trained_parameter_counts(dtype: Any, size: int) -> None:
    storage = torch.arange(1, 3 * size + 6, dtype=torch.float32).to(dtype)
    for whole in (storage[:size], storage[1 : size + 1], storage[: 3 * size : 3]):
        before = bit_sums([whole])
        assert before == bit_sums([whole])
        for place in range(size):
            kept = whole[place].clone()
            whole[place] = kept * 2
            assert before != bit_sums([whole]), (place, whole)
            whole[place] = kept
        assert before == bit_sums([whole])
