"""Which modules an adapter stands on: Unsloth's `finetune_*` switches as PEFT's target_modules and layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from trlpatch.errors import ConflictingArguments

CALL = "FastLanguageModel.get_peft_model"

_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|experts?|moe", re.IGNORECASE)
_NOTHING = re.compile(r"(?!)")
_SWITCHES = {
    "finetune_vision_layers": True,
    "finetune_audio_layers": True,
    "finetune_language_layers": True,
    "finetune_attention_modules": True,
    "finetune_mlp_modules": True,
}
"""Unsloth's switches, and what they are here unless given. A text model has no layers for the first two."""


def take_switches(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with target_modules and layers_to_transform for Unsloth's switches.

    With every switch on, target_modules stays what it was.

    Raises:
        ConflictingArguments: a switch is neither True nor False, nothing is left to adapt, or `finetune_last_n_layers`
            is no number of layers.
    """
    settings = dict(settings)
    on = {name: settings.pop(name, default) for name, default in _SWITCHES.items()}
    for name, value in on.items():
        if not isinstance(value, bool):
            raise ConflictingArguments(f"{CALL}: {name}={value!r}: expected True or False")
    _take_last_layers(model, settings)
    if not on["finetune_language_layers"]:
        raise ConflictingArguments(
            f"{CALL}: finetune_language_layers=False leaves nothing to adapt: a text model has language layers only; "
            "set it to True"
        )
    attention, mlp = on["finetune_attention_modules"], on["finetune_mlp_modules"]
    if not attention and not mlp:
        raise ConflictingArguments(
            f"{CALL}: finetune_attention_modules=False and finetune_mlp_modules=False leave nothing to adapt; set one "
            "of them to True"
        )
    if not attention or not mlp:
        unwanted = _ATTENTION if not attention else _MLP
        targets = settings.get("target_modules")
        settings["target_modules"] = _without(model, targets, unwanted)
        if not settings["target_modules"]:
            switch = "finetune_attention_modules" if not attention else "finetune_mlp_modules"
            raise ConflictingArguments(
                f"{CALL}: {switch}=False leaves none of target_modules={targets!r} to adapt; set it to True, or name "
                "other target_modules"
            )
    return settings


def _take_last_layers(model: Any, settings: dict[str, Any]) -> None:
    count = settings.pop("finetune_last_n_layers", None)
    if count is None:
        return
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers = int(text.num_hidden_layers)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= layers:
        raise ConflictingArguments(
            f"{CALL}: finetune_last_n_layers={count!r}: expected a whole number from 1 to {layers}, the layers that "
            "the model has"
        )
    if settings.get("layers_to_transform") is not None:
        raise ConflictingArguments(
            f"{CALL}: finetune_last_n_layers={count} and layers_to_transform={settings['layers_to_transform']!r} both "
            "say which layers are adapted; leave one of them out"
        )
    settings["layers_to_transform"] = list(range(layers - count, layers))
    if isinstance(settings.get("target_modules"), str):  # PEFT limits named layers only
        settings["target_modules"] = _without(model, settings["target_modules"], _NOTHING)


def _without(model: Any, targets: Sequence[str] | str | None, unwanted: re.Pattern[str]) -> list[str]:
    """The targeted modules that are not of the unwanted kind; where all are targeted, linear layers but the head.

    By their last name where every layer of that name stays, else by their paths.
    """
    chosen = _chosen(targets)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    named = targets is not None and targets != "all-linear"
    found = [
        path
        for path, module in model.named_modules()
        if chosen(path) and (named or (module is not head and _is_linear(module)))
    ]
    kept = [path for path in found if not any(unwanted.search(part) for part in path.split(".")[:-1])]
    names = {path.rpartition(".")[2] for path in kept}
    of_both = {path.rpartition(".")[2] for path in found if path not in set(kept)} & names
    # PEFT adapts every layer of a name, also those that were not chosen.
    return sorted(names - of_both) + [path for path in kept if path.rpartition(".")[2] in of_both]


def _chosen(targets: Sequence[str] | str | None) -> Callable[[str], bool]:
    """Does PEFT adapt a module of this path? None stands for all of them here."""
    if targets is None or targets == "all-linear":
        return lambda path: True
    if isinstance(targets, str):
        pattern = re.compile(targets)
        return lambda path: pattern.fullmatch(path) is not None
    names = tuple(targets)
    return lambda path: any(path == name or path.endswith(f".{name}") for name in names)


def _is_linear(module: Any) -> bool:
    return "Linear" in type(module).__name__ and hasattr(module, "in_features")
