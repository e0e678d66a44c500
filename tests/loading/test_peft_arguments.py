"""Arguments that scripts written for Unsloth give `get_peft_model`."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model
from trlpatch import FastLanguageModel
from trlpatch.errors import ConflictingArguments, UnknownArgument
from trlpatch.loading.adapter import mark_fully_trained
from trlpatch.loading.lora_targets import LINEARS
from trlpatch.policy.adapter import lora_view

pytestmark = pytest.mark.torch


def adapted(**settings: Any) -> Any:
    return FastLanguageModel.get_peft_model(base_model(), r=4, use_gradient_checkpointing=False, **settings)


def test_what_asks_for_nothing_is_taken() -> None:
    made = adapted(
        max_seq_length=2048,
        temporary_location="_buffers",
        qat_scheme=None,
        loftq_config=None,
        target_parameters=None,
        ensure_weight_tying=False,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        finetune_last_n_layers=None,
        modules_to_save=None,
        layers_to_transform=None,
        layers_pattern=None,
        use_rslora=False,
        init_lora_weights=True,
    )
    config = made.peft_config["default"]
    assert config.r == 4
    assert config.target_modules == set(LINEARS)
    assert adapted(loftq_config={}).peft_config["default"].loftq_config == {}


def layers_of(made: Any) -> set[str]:
    view = lora_view(made)
    assert view is not None
    return {path for path, _ in view.layers}


@pytest.mark.parametrize("targets", [LINEARS, "all-linear", None])
def test_the_switches_choose_layers(targets: Any) -> None:
    found = layers_of(adapted(target_modules=targets, finetune_mlp_modules=False))
    assert {path.split(".")[-2] for path in found} == {"self_attn"}
    assert len(found) == 8
    found = layers_of(adapted(target_modules=targets, finetune_attention_modules=False, finetune_last_n_layers=1))
    assert found == {f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def test_the_last_layers_of_targets_that_peft_would_not_limit() -> None:
    found = layers_of(adapted(target_modules="all-linear", finetune_last_n_layers=1))
    assert found == {path for path in layers_of(adapted()) if ".1." in path}


def test_pefts_own_arguments_are_followed() -> None:
    made = adapted(use_rslora=True, layers_to_transform=[0], init_lora_weights="gaussian")
    assert len(layers_of(made)) == 7
    config = made.peft_config["default"]
    assert (config.use_rslora, config.init_lora_weights) == (True, "gaussian")
    assert layers_of(adapted(target_modules="all-linear")) == layers_of(adapted())
    assert adapted(modules_to_save=["lm_head"]).peft_config["default"].modules_to_save == ["lm_head"]


def test_a_fully_trained_model_takes_no_adapter() -> None:
    model = base_model()
    mark_fully_trained(model)
    with pytest.raises(ConflictingArguments, match="full_finetuning=True, so all of its weights are trained"):
        FastLanguageModel.get_peft_model(model)
    assert lora_view(model) is None


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"qat_scheme": "int4"}, ConflictingArguments, "qat_scheme='int4' is not supported"),
        (
            {"finetune_attention_modules": False, "finetune_mlp_modules": False},
            ConflictingArguments,
            "nothing to adapt",
        ),
        ({"lora_alpha": None}, ConflictingArguments, "lora_alpha=None: expected a number"),
        ({"temporary_place": ""}, UnknownArgument, "temporary_place="),
        ({"lora_r": 8}, UnknownArgument, r"lora_r= is not an argument .*; did you mean r=\?"),
        ({"rank": 8}, UnknownArgument, r"mean r=\?"),
        ({"lora_rank": 8}, UnknownArgument, r"mean r=\?"),
        ({"alpha": 8}, UnknownArgument, r"mean lora_alpha=\?"),
        ({"dropout": 0.1}, UnknownArgument, r"mean lora_dropout=\?"),
        ({"modules": ["q_proj"]}, UnknownArgument, r"mean target_modules=\?"),
        ({"lora_drop": 0.1}, UnknownArgument, r"mean lora_dropout=\?"),
    ],
)
def test_what_cannot_be_followed_says_so(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        adapted(**settings)
