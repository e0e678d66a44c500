from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402
from trlpatch.policy.lora_support import unsupported_reason  # noqa: E402

pytestmark = pytest.mark.torch


def reason(model: Any) -> str | None:
    view = lora_view(model)
    assert view is not None
    return unsupported_reason(view)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1},
    ],
)
def test_plain_lora_can_be_sent(changes: dict[str, Any]) -> None:
    assert reason(lora_model(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias=True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"init_lora_weights": "pissa"}, "rewrites the base weights"),
        ({"init_lora_weights": "olora"}, "rewrites the base weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
    ],
)
def test_what_vllm_cannot_express_is_named(changes: dict[str, Any], says: str) -> None:
    found = reason(lora_model(**changes))
    assert found is not None
    assert says in found


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3Config is not a LoRA adapter"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "LoHaConfig is not a LoRA adapter"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "learns a prompt"),
    ],
)
def test_other_adapters_are_named(config: Any, says: str) -> None:
    found = reason(peft.get_peft_model(base_model(), config))
    assert found is not None
    assert says in found


def test_a_second_adapter_matters_only_while_it_is_active() -> None:
    model = lora_model()
    model.add_adapter("ref", model.peft_config["default"])
    assert reason(model) is None
    model.base_model.set_adapter(["default", "ref"])
    assert reason(model) == "2 adapters are active (default, ref); a request carries one"


def test_absent_parameters_are_named() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    _, _, b, _ = view.pairs("default")[0]
    b.data = torch.empty(0)
    assert "hold no data" in str(reason(model))


def test_an_adapter_that_is_disabled_in_some_layers_only() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    view.layers[0][1].enable_adapters(False)
    assert "disabled in some layers only" in str(reason(model))


def test_experts_as_parameters_are_no_plain_lora() -> None:
    """PEFT 0.21 on transformers 5 makes `all-linear` adapt an expert layer's fused parameters, with another rank."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(vocab_size=64, num_hidden_layers=1, **sizes, **experts, **heads)
    attention = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert reason(peft.get_peft_model(Qwen3MoeForCausalLM(config), attention)) is None
    every = peft.get_peft_model(Qwen3MoeForCausalLM(config), peft.LoraConfig(r=4, target_modules="all-linear"))
    fused = [path for path, layer in every.named_modules() if type(layer).__name__ == "ParamWrapper"]
    found = reason(every)
    assert (found is None) == (not fused), found
    if fused:
        assert "experts" in str(found) or "ParamWrapper" in str(found)
