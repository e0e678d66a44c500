"""The operator of a linear layer with one adapter: y = W·x + bias, and + B·A·x where a token has the adapter.

An operator of its own is opaque to torch.compile, so the choice between a batch with and one without the adapter is
made when it runs, from a flag in host memory, as vLLM's LoRA operators do (lora_kernel_metadata.py). Under CUDA graphs
it is made at capture: vLLM's dispatcher keeps graphs for both, or only for batches with an adapter.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NAMESPACE = "trlpatch"
VERSION = 1
"""Part of the key of compiled code; another one for another schema or meaning of the operator."""
_SCHEMA = (
    "linear_with_adapter(Tensor x, Tensor full, Tensor b, Tensor? bias, Tensor token_slots, Tensor? active_slots, "
    "Tensor? no_adapter, int[] starts) -> Tensor"
)


@cache
def operator() -> Any:
    """Register the operator, once per process, and return it: `torch.ops.trlpatch.linear_with_adapter`.

    x: [M, K]; full: [P, K], the N rows of W, then `rank` rows of A per slice; b: [N, rank], B of all slices below each
    other, scaled; bias: [N]; token_slots: [>= M], the slot of each token's adapter, -1 for none; active_slots: the
    slots in the batch, all of them -1 when a batch without adapters runs in a graph that was captured with one;
    no_adapter: a flag on the CPU, true when no token has one; starts: the first row of each slice but the first.
    Returns [M, N], contiguous.
    """
    import torch

    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("linear_with_adapter", _on_cpu, "CPU")
    library.impl("linear_with_adapter", _on_cuda, "CUDA")
    # Not an implementation for meta tensors: those must have one device, and `no_adapter` is on the CPU.
    torch.library.register_fake(f"{NAMESPACE}::linear_with_adapter", _shape, lib=library)
    _libraries.append(library)
    return torch.ops.trlpatch.linear_with_adapter.default


_libraries: list[Any] = []
"""An operator lives as long as the library object that defines it."""


def _shape(x: Tensor, full: Tensor, b: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


def _on_cuda(
    x: Tensor,
    full: Tensor,
    b: Tensor,
    bias: Tensor | None,
    token_slots: Tensor,
    active_slots: Tensor | None,
    no_adapter: Tensor | None,
    starts: list[int],
) -> Tensor:
    import torch

    from trlpatch.engine.single_adapter.expand import expand

    if no_adapter is not None and bool(no_adapter.item()):
        return torch.nn.functional.linear(x, full[: b.shape[0]], bias)
    return expand(torch.nn.functional.linear(x, full), b, bias, token_slots, active_slots, starts)


def _on_cpu(
    x: Tensor,
    full: Tensor,
    b: Tensor,
    bias: Tensor | None,
    token_slots: Tensor,
    active_slots: Tensor | None,
    no_adapter: Tensor | None,
    starts: list[int],
) -> Tensor:
    """The same in torch alone, and the meaning of the CUDA kernel: tests compare the two."""
    import torch

    (base, rank), both = b.shape, torch.nn.functional.linear
    has = token_slots[: x.shape[0]] >= 0
    if not bool(has.any()) or (active_slots is not None and not bool((active_slots >= 0).any())):
        return both(x, full[:base], bias)
    wide = both(x, full)
    y = wide[:, :base].float().contiguous()
    if bias is not None:
        y += bias.float()
    a, b = wide[:, base:].float(), b.float()
    first, every = [0, *starts], bool(has.all())
    for number, (start, stop) in enumerate(zip(first, [*starts, base], strict=True)):
        of_slice = a[:, number * rank : (number + 1) * rank]
        if every:
            y[:, start:stop].addmm_(of_slice, b[start:stop].T)
        else:  # not 0·B, which is no number where B is none
            y[:, start:stop] += torch.where(has[:, None], of_slice @ b[start:stop].T, 0)
    return y.to(x.dtype)
