"""What chooses a model's checkpointed layers does not keep the model alive, nor the engine on it."""

from __future__ import annotations

import gc
import weakref

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model
from trlpatch.loading.adapter import set_gradient_checkpointing
from trlpatch.policy.checkpointing import auto_checkpointing

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("auto", [False, True])
def test_a_model_can_be_freed(auto: bool) -> None:
    model = base_model()
    set_gradient_checkpointing(model, on=True, auto=auto)
    assert (auto_checkpointing(model) is not None) is auto
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
