"""`for_inference` and `for_training`: what they change on a model, and on the tokenizer that came with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model, lora_model
from trlpatch import FastLanguageModel, FastModel
from trlpatch.errors import ConflictingArguments
from trlpatch.loading.adapter import set_gradient_checkpointing
from trlpatch.loading.modes import remember_tokenizer
from trlpatch.policy.adapter import base_of
from trlpatch.policy.checkpointing import auto_checkpointing

pytestmark = pytest.mark.torch


class Tokenizer:
    padding_side = "left"


def checkpointed(model: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


@pytest.mark.parametrize("make", [base_model, lora_model])
@pytest.mark.parametrize("calls", [FastLanguageModel, FastModel])
def test_a_model_changes_its_mode_and_back(make: Any, calls: Any) -> None:
    model, tokenizer = make(), Tokenizer()
    remember_tokenizer(model, tokenizer)
    base = base_of(model)
    assert calls.for_training(model) is model
    assert (model.training, checkpointed(model), base.config.use_cache, tokenizer.padding_side) == (
        True, True, False, "right",
    )  # fmt: skip
    assert calls.for_inference(model) is model
    assert (model.training, checkpointed(model), base.config.use_cache, tokenizer.padding_side) == (
        False, False, True, "left",
    )  # fmt: skip
    assert not any(part.training for part in model.modules())
    assert not base.get_input_embeddings()._forward_hooks, "nothing is left of checkpointing"


def test_a_training_after_it_has_gradients() -> None:
    import torch

    model = lora_model()
    FastLanguageModel.for_training(FastLanguageModel.for_inference(model))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_without_checkpointing_the_cache_stays() -> None:
    model = FastLanguageModel.for_training(base_model(), use_gradient_checkpointing=False)
    assert (model.training, checkpointed(model), model.config.use_cache) == (True, False, True)


def test_a_choice_of_layers_stays_a_choice() -> None:
    model = base_model()
    set_gradient_checkpointing(model, on=True, auto=True)
    FastLanguageModel.for_inference(model)
    assert not checkpointed(model)
    FastLanguageModel.for_training(model)
    assert auto_checkpointing(model) is not None
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert auto_checkpointing(model) is None


def test_a_tokenizer_is_no_model() -> None:
    for call in (FastLanguageModel.for_inference, FastLanguageModel.for_training):
        with pytest.raises(ConflictingArguments, match="expected a model, found SimpleNamespace"):
            call(SimpleNamespace(padding_side="left"))
    with pytest.raises(ConflictingArguments, match="use_gradient_checkpointing='trl'"):
        FastLanguageModel.for_training(base_model(), "trl")
