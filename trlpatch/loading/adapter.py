"""`get_peft_model`: a LoRA adapter that the engine can serve, checked before anything is trained."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

from trlpatch.engine import lora_limits, probes
from trlpatch.engine.attach import attached_engine
from trlpatch.engine.backend import backend_of
from trlpatch.engine.build import random_state_kept
from trlpatch.engine.probes import WEIGHTS
from trlpatch.engine.state import state_of
from trlpatch.errors import AdapterNotExpressible, ConflictingArguments, RankAboveEngine, UnknownArgument
from trlpatch.export.api import attach_export
from trlpatch.loading.load_config import check_gradient_checkpointing, nearest
from trlpatch.loading.lora_targets import CALL, take_switches
from trlpatch.loading.unsloth_arguments import Neutral
from trlpatch.log import logger
from trlpatch.policy import lora_support
from trlpatch.policy.adapter import base_of, lora_view
from trlpatch.policy.checkpointing import auto_checkpointing, set_auto_checkpointing


def with_adapter(model: Any, settings: Mapping[str, Any], *, checkpointing: bool | str, random_state: int) -> Any:
    """Return `model` as a PEFT model with one LoRA adapter; `settings` are those of peft.LoraConfig.

    Raises:
        ConflictingArguments: the model has an adapter already, or a value is out of range.
        UnknownArgument: LoraConfig has no such field.
        RankAboveEngine: a rank is above the engine's max_lora_rank.
        AdapterNotExpressible: the engine shares its base weights and cannot serve the adapter as a request.
    """
    check_gradient_checkpointing(checkpointing)
    if getattr(base_of(model), _FULLY_TRAINED, False):
        raise ConflictingArguments(
            "FastLanguageModel.get_peft_model: the model was loaded with full_finetuning=True, so all of its weights "
            "are trained and its engine has no LoRA; train it as it is, or load it without full_finetuning"
        )
    if lora_view(model) is not None:
        raise ConflictingArguments(
            "FastLanguageModel.get_peft_model: the model has an adapter already; take it off with "
            "`model = model.unload()`, or train it as it is"
        )
    engine = attached_engine(model)
    settings = take_switches(
        model, _without_neutral(settings), tower=engine is None or probes.tower_lora_enabled(engine)
    )
    _check_rank(settings, engine)
    config = _config(settings)
    import torch
    from peft import get_peft_model

    # PEFT puts a hook of its own on the embeddings of a model that has checkpointing on.
    set_gradient_checkpointing(model, on=False, auto=auto_checkpointing(base_of(model)) is not None)
    with random_state_kept():
        torch.manual_seed(random_state)
        adapted = get_peft_model(model, config)
    try:
        check_engine_serves(adapted, engine)
    except AdapterNotExpressible:
        adapted.unload()
        raise
    if checkpointing == "unsloth" and auto_checkpointing(base_of(adapted)) is not None:
        checkpointing = "auto"  # as the model was loaded
    set_gradient_checkpointing(adapted, on=bool(checkpointing), auto=checkpointing == "auto")
    attach_export(base_of(adapted))  # also of a model that from_pretrained did not load
    return adapted


def set_gradient_checkpointing(model: Any, *, on: bool, auto: bool = False) -> None:
    """Switch recomputation of activations on or off, non-reentrant, with gradients at the input embeddings.

    With `auto` as many layers are recomputed as memory needs, also when TRL switches it on itself.
    """
    base = base_of(model)
    alive = weakref.ref(base)  # what is kept for a model must not keep it, and the engine on it, alive
    set_auto_checkpointing(base, on=auto, reserved=lambda: _weights_asleep(alive()))
    # Later releases of transformers (5.23 for one) call it activation checkpointing and warn about the older name.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if on == getattr(base, f"is_{name}_checkpointing"):
        return
    if on:
        getattr(base, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        # Some releases do it themselves, and doing it twice leaves a hook that nobody removes.
        if not _inputs_require_grads(base):
            base.enable_input_require_grads()
    else:
        getattr(base, f"{name}_checkpointing_disable")()
        if _inputs_require_grads(base):
            base.disable_input_require_grads()


def _weights_asleep(base: Any) -> int:
    """Bytes of the engine's weights that are unmapped now: device memory that it needs back."""
    engine = attached_engine(base)
    if engine is None or WEIGHTS not in backend_of(engine).asleep():
        return 0
    return backend_of(engine).weights_bytes() or 0


def _inputs_require_grads(base: Any) -> bool:
    handle = getattr(base, "_require_grads_hook", None)
    return handle is not None and handle.id in (handle.hooks_dict_ref() or {})


_FULLY_TRAINED = "_trlpatch_full_finetuning"


def mark_fully_trained(model: Any) -> None:
    """Note on a transformers model that it was loaded to train every weight."""
    setattr(base_of(model), _FULLY_TRAINED, True)


_NEUTRAL = {
    "ensure_weight_tying": Neutral((False, None), ""),
    "loftq_config": Neutral(({}, None), ""),
    "qat_scheme": Neutral((None,), "weights are not trained for quantization here; leave it out"),
    "target_parameters": Neutral(([], None), ""),
}
"""Settings whose values ask for nothing. Those without a reason are PEFT's own, not all of which every release has."""

_NEVER_USED = ("max_seq_length", "temporary_location")
"""What Unsloth's scripts pass on and nothing here depends on."""


def _without_neutral(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that ask for nothing."""
    kept = {}
    for name, value in settings.items():
        if name in _NEVER_USED or (name in _NEUTRAL and _NEUTRAL[name].asks_nothing(value)):
            continue
        if name in _NEUTRAL and _NEUTRAL[name].otherwise:
            _NEUTRAL[name].check(CALL, name, value)
        kept[name] = value
    if kept.get("lora_alpha", 1) is None:
        raise ConflictingArguments(
            "FastLanguageModel.get_peft_model: lora_alpha=None: expected a number; lora_alpha=r scales by 1"
        )
    return kept


def _check_rank(settings: Mapping[str, Any], engine: Any) -> None:
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConflictingArguments(
                f"FastLanguageModel.get_peft_model: r={rank!r}: expected a whole number, 1 or more"
            )
    limit = probes.max_lora_rank(engine) if engine is not None else 0
    if engine is not None and limit and max(ranks) > limit:
        raise RankAboveEngine(
            f"FastLanguageModel.get_peft_model: r={max(ranks)} is above the engine's max_lora_rank={limit}; load the "
            f"model with max_lora_rank={max(ranks)}, or set r={limit} or less"
        )


_ELSEWHERE = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank", "lora_dim", "max_lora_rank"), "r"),
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    **dict.fromkeys(("modules", "targets", "lora_modules", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("rslora", "use_rs_lora"), "use_rslora"),
    "dora": "use_dora",
    **dict.fromkeys(("gradient_checkpointing", "checkpointing"), "use_gradient_checkpointing"),
    "seed": "random_state",
}
"""What TRL's ModelConfig, Axolotl, LLaMA-Factory, torchtune and trainers call arguments of ours and PEFT's."""


def _config(settings: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    known = frozenset(field.name for field in dataclasses.fields(LoraConfig))
    for name in settings:
        if name not in known:
            raise UnknownArgument(
                f"FastLanguageModel.get_peft_model: {name}= is not an argument of it or of peft.LoraConfig"
                f"{nearest(name, known, _ELSEWHERE)}"
            )
    return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})


def check_engine_serves(adapted: Any, engine: Any) -> None:
    """An error where nothing else could bring the policy into the engine, else a warning."""
    view = lora_view(adapted)
    if engine is None or view is None:
        return
    reason = lora_support.unsupported_reason(view)
    if reason is None and not backend_of(engine).asleep():  # weights that sleep cannot be looked at
        reason = lora_limits.unsupported_reason(view, engine)
    if reason is None:
        return
    if state_of(engine).shared_weights:
        raise AdapterNotExpressible(
            f"FastLanguageModel.get_peft_model: vLLM cannot serve this adapter as a LoRA request: {reason}. Trainer "
            "and engine share the base weights, so merged ones cannot be pushed either; use a plain LoRA adapter on "
            "linear layers, or load the model with share_weights=False"
        )
    logger.warning(
        "FastLanguageModel.get_peft_model: vLLM cannot serve this adapter as a LoRA request: %s; every weight "
        "is written instead, which is slower",
        reason,
    )
