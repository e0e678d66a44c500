"""`for_inference` and `for_training`: a model's mode, gradient checkpointing, KV cache, its tokenizer's padding."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

from trlpatch.errors import ConflictingArguments
from trlpatch.loading.adapter import set_gradient_checkpointing
from trlpatch.loading.load_config import check_gradient_checkpointing
from trlpatch.policy.adapter import base_of
from trlpatch.policy.checkpointing import auto_checkpointing

T = TypeVar("T")

_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The transformers models that were loaded here, and the tokenizers that came with them."""


def remember_tokenizer(model: Any, tokenizer: Any) -> None:
    """Note which tokenizer's padding follows the mode of a model."""
    _tokenizers[base_of(model)] = tokenizer


def for_inference(model: T) -> T:
    """Evaluation mode, every activation computed once, KV cache on, padding on the left."""
    base = _require_model(model, "for_inference")
    model.eval()  # type: ignore[attr-defined]
    set_gradient_checkpointing(model, on=False, auto=auto_checkpointing(base) is not None)
    base.config.use_cache = True
    _pad(base, "left")
    return model


def for_training(model: T, checkpointing: bool | str = True) -> T:
    """Training mode, checkpointing as given, padding on the right; with checkpointing the KV cache is off.

    Raises ConflictingArguments for something that is no model, or another value of `checkpointing`.
    """
    base = _require_model(model, "for_training")
    check_gradient_checkpointing(checkpointing)
    model.train()  # type: ignore[attr-defined]
    auto = checkpointing == "auto" or (bool(checkpointing) and auto_checkpointing(base) is not None)
    set_gradient_checkpointing(model, on=bool(checkpointing), auto=auto)
    base.config.use_cache = not checkpointing
    _pad(base, "right")
    return model


def _pad(base: Any, side: str) -> None:
    tokenizer = _tokenizers.get(base)
    if tokenizer is not None:
        tokenizer.padding_side = side


def _require_model(model: object, call: str) -> Any:
    if not callable(getattr(model, "named_modules", None)):
        raise ConflictingArguments(
            f"FastLanguageModel.{call}(model): expected a model, found {type(model).__name__}; from_pretrained "
            "returns (model, tokenizer), and the model comes first"
        )
    return base_of(model)
