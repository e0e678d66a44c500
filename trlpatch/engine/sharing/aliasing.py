"""Storage aliasing: is every base parameter of a model inside a parameter of the engine?"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from trlpatch.engine.backend import backend_of
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.sharing.eligibility import unsupported_reason
from trlpatch.engine.sharing.names import held_parameters
from trlpatch.errors import CannotShare
from trlpatch.policy.base_parameters import base_parameters

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def verify_overlap(model: Module, llm: RolloutEngine) -> None:
    """Prove that the model computes with the engine's memory.

    Raises:
        CannotShare: a base parameter of `model`, which it names, is not inside a parameter of the engine.
    """
    inside = _EngineStorage(llm)
    for path, _, parameter in base_parameters(model):
        if parameter not in inside:
            raise CannotShare(
                f"sharing weights: {path!r} ({list(parameter.shape)}, {parameter.dtype}, {parameter.device}) has "
                "memory of its own, expected a view of the engine's; attach with shared_weights=False, or build the "
                "model with FastLanguageModel.from_pretrained(..., fast_inference=True)"
            )


def overlaps(model: Module, llm: RolloutEngine) -> bool:
    """Is any base parameter of `model` inside a parameter of the engine?"""
    if unsupported_reason(llm) is not None:
        return False
    inside = _EngineStorage(llm)
    return any(parameter in inside for _, _, parameter in base_parameters(model))


class _EngineStorage:
    """The address ranges of an engine's parameters."""

    def __init__(self, llm: RolloutEngine) -> None:
        module = backend_of(llm).worker_model()
        self._ranges: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for _, held in held_parameters(module):
            if _has_storage(held.parameter):
                self._ranges[held.parameter.untyped_storage().data_ptr()].append(_range(held.parameter))

    def __contains__(self, parameter: Tensor) -> bool:
        if not _has_storage(parameter):
            return False
        start, end = _range(parameter)
        found = self._ranges.get(parameter.untyped_storage().data_ptr(), [])
        return any(low <= start and end <= high for low, high in found)


def _has_storage(tensor: Tensor) -> bool:
    """False on the meta device, and for tensors made of others (torchao's quantized ones, FSDP2's DTensor)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return not tensor.is_meta and tensor.numel() > 0 and not is_traceable_wrapper_subclass(tensor)


def _range(tensor: Tensor) -> tuple[int, int]:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start: int = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.element_size()
