"""Shape check of an adapter against the LoRA layers of the engine's model.

vLLM copies a tensor that is too small into a corner of its buffer, and passes over modules that the model has not,
both without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trlpatch.engine import probes
from trlpatch.engine.protocols import AdapterManager, WeightsMapper
from trlpatch.policy.adapter_tensors import PEFT_PREFIX

Shape = tuple[str, int, int]
"""A module by vLLM's name, its input and its output features."""


def misfit(manager: AdapterManager, shapes: Iterable[Shape]) -> str | None:
    """The first of `shapes` that the LoRA manager's model has not, in words; None when it has them all."""
    slices = {
        member: (packed, at) for packed, members in manager.packed_modules.items() for at, member in enumerate(members)
    }
    for name, *wanted in shapes:
        packed, at = slices.get(name, (name, 0))
        module = manager.modules.get(packed)
        if module is None:
            return f"the engine's model has no LoRA layer for {name!r}"
        has = _features(module, at)
        if has is not None and tuple(wanted) != has:
            return f"{name!r} takes {wanted[0]} to {wanted[1]} features in the adapter, {has[0]} to {has[1]} here"
    return None


def directory_misfit(manager: AdapterManager, directory: Path) -> str | None:
    """As `misfit`, of an adapter that PEFT saved; None also without a file of the format that is looked into."""
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        return None
    return misfit(manager, _saved(file, probes.rename_mapper(manager.model)))


def _features(module: object, at: int) -> tuple[int, int] | None:
    """(input, output) features of one slice of a linear LoRA layer; None for other layers, and for sharded ones."""
    a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
    if not isinstance(a, tuple) or not isinstance(b, tuple) or not at < min(len(a), len(b)):
        return None
    if getattr(module, "tp_size", 1) > 1 or hasattr(module, "w13_lora_a_stacked"):
        return None
    return int(a[at].shape[-1]), int(b[at].shape[-2])


def _saved(file: Path, mapper: WeightsMapper | None) -> list[Shape]:
    from safetensors import safe_open

    sides: dict[str, dict[str, int]] = {}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a mapping
            path, found, side = key.removeprefix(PEFT_PREFIX).partition(".lora_")
            if found and side in ("A.weight", "B.weight"):
                sides.setdefault(path, {})[side[0]] = tensors.get_slice(key).get_shape()[1 if side[0] == "A" else 0]
    names = [f"{path}.weight" for path in sides]
    renamed = names if mapper is None else [one for name in names for one in mapper.apply_list([name])[:1] or [name]]
    return [
        (name.removesuffix(".weight"), side["A"], side["B"])
        for name, side in zip(renamed, sides.values(), strict=True)
        if len(side) == 2
    ]
