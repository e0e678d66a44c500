"""One Triton kernel that copies a whole adapter into the engine and tells whether it is another one than before.

The way of a CUDA device: every A and B is read once, written into staging and into the slot, and hashed from the same
registers. The copy is made whatever the hashes say, so a wrong answer could leave a wrong name, never old weights.
The same launch hashes the spots of the base weights.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.engine.adapter_sync.staging import Target
from trlpatch.policy import triton_kernels
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.base_weights import Spots, spots_under

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NotFused(Exception):  # an answer, caught by the caller
    """The kernel cannot make this copy; the message says why."""


def kernel_module() -> Any:
    """The module of the kernel, or None where there is no Triton."""
    return triton_kernels.kernel_module("trlpatch.engine.adapter_sync.fused_kernel", "copy_and_hash")


@dataclass(frozen=True)
class _Group:
    """Blocks of sources of one dtype: one launch."""

    dtype: torch.dtype
    where: Tensor
    hashes: Tensor


@dataclass(frozen=True)
class _Table:
    """The addresses of one adapter's tensors and of one slot, on the device."""

    rows: Tensor
    scales: Tensor
    where: list[Tensor]
    """Blocks of every group, the spots' after those of the first."""
    spots: Spots | None
    hashed: bool
    """Are the spots among them?"""
    kept: list[Tensor]
    """What is read, so that its memory stays while the table does: it may be read before anybody has looked whether
    the parameters are still there."""
    aligned: bool


class Launched:
    """A copy that the device makes; see `Pending`."""

    def __init__(self, copy: FusedCopy, spots: Spots | None) -> None:
        self._copy = copy
        self._spots = spots
        self._answer: list[int] | None = None

    def wait(self) -> int:
        """Wait for the one event behind the copy."""
        return self._wait()[0]

    def base_glance(self, spots: object) -> object | None:
        """See CopyUnderway."""
        if self._spots is None or spots is not self._spots:
            return None
        return self._copy.token, self._wait()[1]

    def _wait(self) -> list[int]:
        if self._answer is None:
            self._answer = self._copy.answer()
        return self._answer


class FusedCopy:
    """Copies adapters of one structure; made for the tensors of one staging and any slot of the same buffers.

    Raises NotFused for what the kernel does not do: other devices than CUDA, other dtypes than float32, bfloat16 and
    float16, tensors of more than 2**31 elements.
    """

    def __init__(self, weights: LoraWeights, targets: list[Target]) -> None:
        import torch

        sources = [*weights.a, *weights.b]
        device = targets[0].staging.device
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise NotFused(f"a {device.type} device")
        module = kernel_module()
        if module is None:
            raise NotFused("Triton is missing")
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        for source, target in zip(sources, targets, strict=True):
            if source.dtype not in names or target.staging.dtype not in names:
                raise NotFused(f"{source.dtype} to {target.staging.dtype}")
            if target.staging.numel() >= 2**31 - module.BLOCK:
                raise NotFused(f"a tensor of {target.staging.numel()} elements")
        self._module = module
        self._device = device
        self._step = 0
        self.token = object()
        """Tells the answers of this object from those of another one."""
        self._unread: Launched | None = None
        with torch.inference_mode(False):
            self._changed = torch.zeros(2, dtype=torch.int64, device=device)
            self._answer = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._groups = [
                self._group(dtype, [index for index, source in enumerate(sources) if source.dtype == dtype], sources)
                for dtype in dict.fromkeys(source.dtype for source in sources)
            ]
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    def _group(self, dtype: torch.dtype, indices: list[int], sources: list[Tensor]) -> _Group:
        import torch

        block = self._module.BLOCK
        where = [(index, start) for index in indices for start in range(0, sources[index].numel(), block)]
        return _Group(
            dtype,
            torch.tensor(where, dtype=torch.int32).to(self._device),
            # With room for a spot under every layer.
            torch.zeros(len(where) + len(sources) // 2, 2, dtype=torch.int32, device=self._device),
        )

    def run(self, weights: LoraWeights, targets: list[Target], slot: int) -> int:
        """`start`, and wait until it has arrived."""
        return self.start(weights, targets, slot).wait()

    def start(self, weights: LoraWeights, targets: list[Target], slot: int) -> Launched:
        """Begin to copy; its answer is another number when the sources' bits are.

        Raises NotFused, before anything was written, for sources that are elsewhere or not contiguous.
        """
        if self._unread is not None:  # its answer comes to the same place
            self._unread.wait()
        table = self._table(weights, targets, slot)
        with triton_kernels.on(self._device):
            self._launch(table, targets[0].staging.dtype)
        self._unread = Launched(self, table.spots if table.hashed else None)
        return self._unread

    def _launch(self, table: _Table, target: torch.dtype) -> None:
        self._step += 1
        for group, where in zip(self._groups, table.where, strict=True):
            self._module.copy_and_hash[(where.shape[0],)](
                table.rows,
                table.scales,
                where,
                group.hashes,
                self._changed,
                self._step,
                SOURCE=triton_kernels.language(group.dtype),
                BITS=triton_kernels.language(group.dtype, bits=True),
                TARGET=triton_kernels.language(target),
                ALIGNED=table.aligned,
                BLOCK=self._module.BLOCK,
                COLUMNS=self._module.COLUMNS,
                num_warps=8,
            )
        self._answer.copy_(self._changed, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def answer(self) -> list[int]:
        """Wait for the last launch; the step in which what is copied was last another one, and what is only hashed."""
        self._unread = None
        if self._arrived is not None:
            self._arrived.synchronize()
        changed: list[int] = self._answer.tolist()
        return changed

    def _table(self, weights: LoraWeights, targets: list[Target], slot: int) -> _Table:
        """Kept with the weights, whose addresses it holds: another one is made when they are others."""
        owner, at, kept = weights.derived.get("fused copy", (None, None, None))
        spots = spots_under(weights)
        if kept is not None and owner() is self and at == slot and kept.spots is spots:
            return kept  # type: ignore[no-any-return]
        table = self._made(weights, targets, spots)
        weights.derived["fused copy"] = (weakref.ref(self), slot, table)
        return table

    def _made(self, weights: LoraWeights, targets: list[Target], spots: Spots | None) -> _Table:
        import torch

        sources = weights.parameters
        rows = []
        for source, target in zip(sources, targets, strict=True):
            if source.device != self._device or not source.is_contiguous():
                raise NotFused(f"a source of strides {source.stride()} on {source.device}")
            length, stride = source.shape[1], target.slot.stride(0)
            if target.staging.stride() != target.slot.stride() or target.slot.stride(1) != 1:
                raise NotFused("staging and slot are laid out differently")
            addresses = [source.data_ptr(), target.staging.data_ptr(), target.slot.data_ptr()]
            rows.append([*addresses, source.numel(), length, stride])
        pieces = self._readable(spots)
        first, size = len(rows), sources[0].element_size()
        rows += [[piece.data_ptr(), 0, 0, *[piece.nbytes // size] * 3] for piece in pieces]
        scales = [1.0] * len(weights.a) + weights.scalings + [1.0] * len(pieces)
        with torch.inference_mode(False):
            where = [group.where for group in self._groups]
            if pieces:
                where[0] = torch.cat([where[0], where[0].new_tensor([(first + at, 0) for at in range(len(pieces))])])
            return _Table(
                torch.tensor(rows, dtype=torch.int64).to(self._device),
                torch.tensor(scales, dtype=torch.float32).to(self._device),
                where,
                spots,
                bool(pieces),
                [*(source.detach() for source in sources), *pieces],
                aligned=all(number % 16 == 0 for row in rows for number in row[:4]),
            )

    def _readable(self, spots: Spots | None) -> list[Tensor]:
        """The pieces of the spots, to be read as elements of the first group's size; none unless all are at hand."""
        if spots is None or len(spots.pieces) > self._groups[0].hashes.shape[0] - self._groups[0].where.shape[0]:
            return []
        return spots.pieces if all(piece.device == self._device for piece in spots.pieces) else []
