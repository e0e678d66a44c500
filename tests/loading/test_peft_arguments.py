"""Arguments that scripts written for Unsloth give `get_peft_model`."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.models import base_model
from trlpatch import FastLanguageModel
from trlpatch.errors import ConflictingArguments, UnknownArgument

pytestmark = pytest.mark.torch


def adapted(**settings: Any) -> Any:
    return FastLanguageModel.get_peft_model(base_model(), r=4, use_gradient_checkpointing=False, **settings)


def test_what_asks_for_nothing_is_taken() -> None:
    made = adapted(max_seq_length=2048, temporary_location="_buffers", qat_scheme=None, loftq_config={})
    assert made.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"qat_scheme": "int4"}, ConflictingArguments, "qat_scheme='int4' is not supported"),
        ({"lora_alpha": None}, ConflictingArguments, "lora_alpha=None: expected a number"),
        ({"temporary_place": ""}, UnknownArgument, "temporary_place="),
    ],
)
def test_what_cannot_be_followed_says_so(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        adapted(**settings)
