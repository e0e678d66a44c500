"""Missing layers: what to do where the engine has no LoRA layer for a module that the adapter stands on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes

if TYPE_CHECKING:
    from torch.nn import Module

_NAMED = 4


def in_words(model: Module, unknown: Sequence[str], paths: Sequence[str]) -> str:
    """Say which layers are missing, and of a vision tower or its connector how the adapter can be had.

    Args:
        model: vLLM's.
        unknown: vLLM's names of the modules that it has no LoRA layer for.
        paths: of all adapted modules, in the transformers model.
    """
    more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
    said = f"the engine's model has no LoRA layer for {', '.join(unknown[:_NAMED])}{more}"
    outside = _outside(model)
    if not outside or not all(name.startswith(outside) for name in unknown):
        return said
    return (
        f"{said}: layers of the vision tower or its connector, which vLLM adapts only where it was built with "
        "enable_tower_connector_lora=True, and for some models; set that, or adapt the language model alone, "
        f"{_language_only(model, set(unknown), paths)}"
    )


def _common(paths: Sequence[Sequence[str]]) -> str:
    """The names that all dotted paths begin with, up to the number of a layer."""
    shared: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1 or names[0].isdigit():
            break
        shared.append(names[0])
    return ".".join(shared)


def _outside(model: Any) -> tuple[str, ...]:
    """What the names of layers outside of the language model begin with; empty for a text model."""
    mapping = getattr(model, "get_mm_mapping", None)
    if not callable(mapping):
        return ()
    keys = mapping()
    return tuple(prefix for part in ("connector", "tower_model") for prefix in getattr(keys, part, ()) or ())


def _language_only(model: Module, unknown: set[str], paths: Sequence[str]) -> str:
    mapper = probes.rename_mapper(model)
    known = [path for path in paths if unknown.isdisjoint([path] if mapper is None else mapper.apply_list([path]))]
    layers = _common([path.split(".") for path in known])
    if not layers:
        return "with target_modules that match its layers only"
    last = "|".join(sorted({path.rpartition(".")[2] for path in known}))
    return rf"target_modules=r'{re.escape(layers)}\..*\.({last})'"
