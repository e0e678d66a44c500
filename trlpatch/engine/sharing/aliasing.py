"""Is every base parameter of a model inside a parameter of the engine?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.sharing.eligibility import engine_reason
from trlpatch.engine.sharing.names import held_parameters
from trlpatch.errors import CannotShare
from trlpatch.policy.adapter import base_of

_WRAPPED = ("base_layer", "original_module")
"""What PEFT calls the layer inside its own: of tuners, and of `modules_to_save` and trainable tokens."""


def base_parameters(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, module, parameter) of the transformers model under PEFT, with the paths that it has without PEFT.

    Nothing that PEFT added is among them. Shared parameters come under each of their names.
    """
    yield from _walk(base_of(model), "")


def _walk(module: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    for name in _WRAPPED:
        inner = module._modules.get(name)
        if inner is not None:
            yield from _walk(inner, path)
            return
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{path}{leaf}", module, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}{name}.")


def verify_overlap(model: Any, llm: Any) -> None:
    """Raise CannotShare, naming it, if a base parameter of `model` is not inside a parameter of the engine."""
    inside = _EngineStorage(llm)
    for path, _, parameter in base_parameters(model):
        if parameter not in inside:
            raise CannotShare(
                f"sharing weights: {path!r} ({list(parameter.shape)}, {parameter.dtype}, {parameter.device}) has "
                "memory of its own, expected a view of the engine's; attach with shared_weights=False, or build the "
                "model with FastLanguageModel.from_pretrained(..., fast_inference=True)"
            )


def overlaps(model: Any, llm: Any) -> bool:
    """Is any base parameter of `model` inside a parameter of the engine?"""
    if engine_reason(llm) is not None:
        return False
    inside = _EngineStorage(llm)
    return any(parameter in inside for _, _, parameter in base_parameters(model))


class _EngineStorage:
    """The address ranges of an engine's parameters."""

    def __init__(self, llm: Any) -> None:
        module = probes.engine_module(llm)
        if module is None:
            raise CannotShare("sharing weights: the engine's worker runs in another process")
        self._ranges: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for _, held in held_parameters(module):
            if _has_storage(held.parameter):
                self._ranges[held.parameter.untyped_storage().data_ptr()].append(_range(held.parameter))

    def __contains__(self, parameter: Any) -> bool:
        if not _has_storage(parameter):
            return False
        start, end = _range(parameter)
        found = self._ranges.get(parameter.untyped_storage().data_ptr(), [])
        return any(low <= start and end <= high for low, high in found)


def _has_storage(tensor: Any) -> bool:
    """False on the meta device, and for tensors made of others (torchao's quantized ones, FSDP2's DTensor)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return not tensor.is_meta and tensor.numel() > 0 and not is_traceable_wrapper_subclass(tensor)


def _range(tensor: Any) -> tuple[int, int]:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start: int = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.element_size()
