"""Locate the LoRA buffers: which part of which one holds which tensor of an adapter.

Layout of the buffers of a linear layer, vLLM 0.8.0 to 0.33.0: tuples with one entry per packed slice (q, k and v; gate
and up; one for single layers), A [max_loras, 1, max_lora_rank, in] and B [max_loras, 1, out, max_lora_rank].
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from trlpatch.engine.protocols import AdapterManager, LoraModel

if TYPE_CHECKING:
    from torch import Tensor


_BUFFERS = attrgetter("lora_a_stacked")


class Unexpected(Exception):  # an answer, caught by the caller
    """The buffers are not laid out as described above; the message says what they are."""


@dataclass(frozen=True)
class Slots:
    """Where the tensors of one registered adapter go.

    `a` and `b` hold (the buffer, the tensor that vLLM would copy into it), in the same order.
    """

    modules: list[Any]
    buffers: list[object]
    """What the modules' `lora_a_stacked` were, one per module."""
    a: list[tuple[Tensor, Tensor]]
    b: list[tuple[Tensor, Tensor]]

    def is_current(self) -> bool:
        """Are the engine's buffers still these?"""
        return all(map(is_, map(_BUFFERS, self.modules), self.buffers))

    def views(self, slot: int) -> list[Tensor]:
        """The parts of the buffers that belong to one slot: [r, in] of every A, then [out, max_lora_rank] of every B.

        Each is contiguous, and of the shape of the tensor that is copied into it.
        """
        return [
            *(buffer[slot, 0, : tensor.shape[0]] for buffer, tensor in self.a),
            *(buffer[slot, 0] for buffer, _ in self.b),
        ]


def find_slots(manager: AdapterManager, lora: LoraModel, staged: set[int]) -> Slots:
    """Look up every tensor of `lora`, registered with the LoRA manager, in the buffers of the manager's modules.

    `staged` are the addresses of the tensors that the adapter was made of, A [r, in] and B [out, max_lora_rank] of the
    buffers' dtype and device.

    Raises:
        Unexpected: not each of them, and nothing else, has one place where it fits.
    """
    modules: list[Any] = []
    buffers: list[object] = []
    pairs_a: list[tuple[Tensor, Tensor]] = []
    pairs_b: list[tuple[Tensor, Tensor]] = []
    for name, module in manager.modules.items():
        entry = lora.get_lora(name)
        if entry is None:
            continue
        if hasattr(module, "w13_lora_a_stacked"):
            raise Unexpected("MoE layers")
        if getattr(module, "tp_size", 1) > 1:
            raise Unexpected("tensor parallelism")
        modules.append(module)
        buffers.append(getattr(module, "lora_a_stacked", None))
        for pairs, attribute, tensors in (
            (pairs_a, "lora_a_stacked", entry.lora_a),
            (pairs_b, "lora_b_stacked", entry.lora_b),
        ):
            stacked = getattr(module, attribute, None)
            parts = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            if not isinstance(stacked, tuple) or len(stacked) != len(parts):
                raise Unexpected(f"{type(module).__name__} has other {attribute} than one buffer per slice")
            pairs += [(buffer, part) for buffer, part in zip(stacked, parts, strict=True) if part is not None]
    for buffer, tensor in pairs_a:
        _check(buffer, tensor, fits=buffer.shape[3:] == tensor.shape[1:] and buffer.shape[2] >= tensor.shape[0])
    for buffer, tensor in pairs_b:
        _check(buffer, tensor, fits=buffer.shape[2:] == tensor.shape)
    placed = [tensor.data_ptr() for _, tensor in (*pairs_a, *pairs_b)]
    if len(placed) != len(staged) or set(placed) != staged:
        raise Unexpected("vLLM keeps copies of the adapter's tensors")
    return Slots(modules, buffers, pairs_a, pairs_b)


def _check(buffer: Tensor, tensor: Tensor, *, fits: bool) -> None:
    alike = buffer.dtype == tensor.dtype and buffer.device == tensor.device
    if buffer.dim() != 4 or buffer.shape[1] != 1 or not fits or not alike or not buffer.is_contiguous():
        raise Unexpected(f"a LoRA buffer of shape {list(buffer.shape)} for a tensor of shape {list(tensor.shape)}")
