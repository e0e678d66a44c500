"""Which modules an adapter stands on: Unsloth's `finetune_*` switches as PEFT's target_modules and layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trlpatch.errors import ConflictingArguments

CALL = "FastLanguageModel.get_peft_model"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What `get_peft_model` adapts in a text model unless told otherwise."""

_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|experts?|moe", re.IGNORECASE)
_NOTHING = re.compile(r"(?!)")
_SWITCHES: dict[str, bool | None] = {
    "finetune_vision_layers": None,
    "finetune_audio_layers": True,
    "finetune_language_layers": True,
    "finetune_attention_modules": True,
    "finetune_mlp_modules": True,
}
"""Unsloth's switches, and what they are here unless given. A text model has no layers for the first two."""


def take_switches(model: Any, settings: dict[str, Any], *, tower: bool = True) -> dict[str, Any]:
    """Return the settings with target_modules and layers_to_transform for Unsloth's switches.

    With every switch on, target_modules of a text model stays what it was. Of a model with a vision tower it becomes
    the layers themselves: those of its language model, and with `finetune_vision_layers` those outside of it, which
    is the default where `tower` says that the rollouts can carry them.

    Raises:
        ConflictingArguments: a switch is neither True nor False, nothing is left to adapt, the engine has no LoRA on
            layers that are asked for, or `finetune_last_n_layers` is no number of layers.
    """
    settings = dict(settings)
    on = {name: settings.pop(name, default) for name, default in _SWITCHES.items()}
    for name, value in on.items():
        if not isinstance(value, bool) and not (value is None and name == "finetune_vision_layers"):
            raise ConflictingArguments(f"{CALL}: {name}={value!r}: expected True or False")
    language = language_model(model)
    _take_last_layers(model, settings)
    attention, mlp = on["finetune_attention_modules"], on["finetune_mlp_modules"]
    if not attention and not mlp:
        raise ConflictingArguments(
            f"{CALL}: finetune_attention_modules=False and finetune_mlp_modules=False leave nothing to adapt; set one "
            "of them to True"
        )
    unwanted = _NOTHING if attention and mlp else _ATTENTION if mlp else _MLP
    if language is not None:
        vision = tower if on["finetune_vision_layers"] is None else bool(on["finetune_vision_layers"])
        if vision and not tower:
            raise ConflictingArguments(
                f"{CALL}: finetune_vision_layers=True, and the engine has LoRA on the language model only; "
                f"{TOWER_ADVICE}, or leave finetune_vision_layers out"
            )
        parts = _Parts(language, language=bool(on["finetune_language_layers"]), vision=vision)
        return _of_parts(model, settings, parts, unwanted)
    if settings.get("target_modules") is LINEARS:
        settings["target_modules"] = list(LINEARS)
    if not on["finetune_language_layers"]:
        raise ConflictingArguments(
            f"{CALL}: finetune_language_layers=False leaves nothing to adapt: a text model has language layers only; "
            "set it to True"
        )
    if unwanted is not _NOTHING:
        targets = settings.get("target_modules")
        settings["target_modules"] = _without(model, targets, unwanted)
        if not settings["target_modules"]:
            switch = "finetune_attention_modules" if not attention else "finetune_mlp_modules"
            raise ConflictingArguments(
                f"{CALL}: {switch}=False leaves none of target_modules={targets!r} to adapt; set it to True, or name "
                "other target_modules"
            )
    return settings


TOWER_ADVICE = "load the model with enable_tower_connector_lora=True, which vLLM has for some models"


def language_model(model: Any) -> str | None:
    """The path of the language model in a model that reads images; None in a text model.

    It is the topmost module whose configuration is of the class of the text model's.
    """
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config or getattr(config, "vision_config", None) is None:
        return None
    for path, module in model.named_modules():
        if path and isinstance(getattr(module, "config", None), type(text)):
            return str(path)
    return None


class _Parts:
    """The parts of a vision-language model that are adapted."""

    def __init__(self, path: str, *, language: bool, vision: bool) -> None:
        self._prefix = f"{path}."
        self._language, self._vision = language, vision

    def of_language(self, path: str) -> bool:
        return path.startswith(self._prefix)

    def have(self, path: str) -> bool:
        return self._language if self.of_language(path) else self._vision

    def __str__(self) -> str:
        return f"finetune_language_layers={self._language}, finetune_vision_layers={self._vision}"


def _of_parts(model: Any, settings: dict[str, Any], parts: _Parts, unwanted: re.Pattern[str]) -> dict[str, Any]:
    """The settings with target_modules as an expression for the layers themselves.

    A name alone would adapt every layer that is called so: SigLIP has a q_proj, too.
    """
    targets = settings.get("target_modules")
    if targets is LINEARS:  # nothing was asked for: a tower calls its layers otherwise
        targets = None
    layers = settings.pop("layers_to_transform", None)  # PEFT does not look at it where an expression matches
    kept = [
        path
        for path in _targeted(model, targets)
        if parts.have(path)
        and not _of_kind(path, unwanted)
        and (layers is None or not parts.of_language(path) or _layer_of(path) in layers)
    ]
    if not kept:
        asked = "" if targets is None else f" of target_modules={targets!r}"
        raise ConflictingArguments(
            f"{CALL}: {parts} and what else was given leave no layer{asked} to adapt; switch another part on, or name "
            "other target_modules"
        )
    settings["target_modules"] = _expression(kept)
    return settings


def _expression(paths: Sequence[str]) -> str:
    """A regular expression for these paths and no others."""
    children: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        children.setdefault(parent, []).append(name)
    parents: dict[tuple[str, ...], list[str]] = {}
    for parent, names in children.items():
        parents.setdefault(tuple(names), []).append(parent)
    found = []
    for children_of, places in parents.items():
        by_shape: dict[str, list[str]] = {}
        for place in places:
            # One number, the layer's, may vary.
            head, number, tail = _split_at_layer(place)
            by_shape.setdefault(f"{re.escape(head)}%{re.escape(tail)}", []).append(number)
        for shape, numbers in by_shape.items():
            place = shape.replace("%", _one_of(numbers) if numbers != [""] else "")
            found.append(rf"{place}\.{_one_of(children_of)}" if place else _one_of(children_of))
    return _one_of(found, escape=False)


def _split_at_layer(path: str) -> tuple[str, str, str]:
    match = re.search(r"(?<=\.)\d+(?=\.|$)", path)
    return (path, "", "") if match is None else (path[: match.start()], match.group(), path[match.end() :])


def _one_of(words: Sequence[str], *, escape: bool = True) -> str:
    words = [re.escape(word) for word in words] if escape else list(words)
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _layer_of(path: str) -> int | None:
    number = _split_at_layer(path)[1]
    return int(number) if number else None


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
    found = list(_targeted(model, targets))
    kept = [path for path in found if not _of_kind(path, unwanted)]
    names = {path.rpartition(".")[2] for path in kept}
    of_both = {path.rpartition(".")[2] for path in found if path not in set(kept)} & names
    # PEFT adapts every layer of a name, also those that were not chosen.
    return sorted(names - of_both) + [path for path in kept if path.rpartition(".")[2] in of_both]


def _targeted(model: Any, targets: Sequence[str] | str | None) -> Iterator[str]:
    chosen = _chosen(targets)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    named = targets is not None and targets != "all-linear"
    for path, module in model.named_modules():
        if chosen(path) and (named or (module is not head and _is_linear(module))):
            yield path


def _of_kind(path: str, kind: re.Pattern[str]) -> bool:
    return any(kind.search(part) for part in path.split(".")[:-1])


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
