"""The classes that stand before vLLM's own LoRA layers while an engine with one adapter slot is built."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from trlpatch.engine.single_adapter import expand
from trlpatch.engine.single_adapter.linear import operator
from trlpatch.engine.single_adapter.storage import Rows, rows_of

if TYPE_CHECKING:
    from torch import Tensor


@cache
def layer_classes() -> tuple[type, ...]:
    """Subclasses of vLLM's LoRA layers that compute base layer and adapter in one operator.

    Registry, eviction, warm-up adapters and `set_lora` are vLLM's: its buffers are views of the storage that the
    operator reads. They replace a layer only if vLLM's class of the same kind would, and if it has `Rows`.
    """
    from vllm.lora.layers import (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
    )

    kinds = (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
    )
    return tuple(type(f"SingleAdapter{kind.__name__}", (_SingleAdapter, kind), {}) for kind in kinds)


class _SingleAdapter:
    """What is different from vLLM's class, the second base."""

    is_single_adapter = True
    base_layer: Any
    punica_wrapper: Any
    _rows: Rows

    @classmethod
    def can_replace_layer(cls, source_layer: Any, **others: Any) -> bool:
        """Answer vLLM's `from_layer`, which passes everything by keyword."""
        theirs: Any = super()
        return _served(source_layer) and bool(theirs.can_replace_layer(source_layer=source_layer, **others))

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: object = None) -> None:
        """Make vLLM's LoRA buffers of one slot: A [1, 1, rank, K] views of the rows, B [1, 1, out, rank] of one."""
        import torch

        rows: Any = rows_of(self.base_layer)
        rank = lora_config.max_lora_rank
        sizes = _sizes(self, rows)
        if max_loras != 1 or rank != rows.rank or sum(sizes) != rows.base or len(sizes) > rows.parts:
            raise RuntimeError(  # `why_not` and `_served` have let through what they must not
                f"{type(self).__name__} of {max_loras} slots, rank {rank} and slices {sizes} in storage for rank "
                f'{rows.rank}, {rows.base} rows and {rows.parts} slices; PatchFastRL(lora_layers="vllm") builds the '
                "engine without it"
            )
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.lora_config = lora_config
        self._full = rows.full
        self._b = torch.zeros(rows.base, rank, dtype=rows.full.dtype, device=rows.full.device)
        self._starts = starts[1:]
        a = rows.full[rows.base :]
        self.lora_a_stacked = tuple(
            a[number * rank : (number + 1) * rank].view(1, 1, rank, -1) for number in range(len(sizes))
        )
        self.lora_b_stacked = tuple(
            self._b[start : start + size].view(1, 1, size, rank) for start, size in zip(starts, sizes, strict=True)
        )
        self.output_slices = tuple(sizes)
        operator()

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the layer for x [..., K]; the adapter counts where vLLM's mapping gives a token one."""
        import torch

        wrapper = self.punica_wrapper
        meta = getattr(wrapper, "token_mapping_meta", None)
        if meta is None:  # PunicaWrapperCPU
            slots, active, none = wrapper._token_lora_indices, None, None
        else:
            slots, active, none = meta.token_lora_mapping, meta.active_lora_ids, meta.no_lora_flag_cpu
        flat = x.flatten(0, -2) if x.ndim > 2 else x  # the Transformers backend has a batch dimension
        y: Tensor = torch.ops.trlpatch.linear_with_adapter(
            flat, self._full, self._b, bias, slots, active, none, self._starts
        )
        return y.unflatten(0, x.shape[:-1]) if x.ndim > 2 else y


def _sizes(layer: Any, rows: Rows) -> list[int]:
    """Output rows of each slice that has an A and a B of its own, as vLLM's class has set them up."""
    return list(layer.output_slices) if layer.n_slices > 1 else [rows.base]


def _served(layer: Any) -> bool:
    """Whether the operator computes what this layer of vLLM's does, the adapter aside."""
    from vllm.model_executor.layers import linear

    rows = rows_of(layer)
    if rows is None or type(layer.quant_method) is not linear.UnquantizedLinearMethod:
        return False
    known = (linear.ColumnParallelLinear, linear.MergedColumnParallelLinear, linear.QKVParallelLinear)
    own_forward = type(layer).forward not in {kind.forward for kind in (*known, linear.RowParallelLinear)}
    sizes = list(layer.output_partition_sizes) if isinstance(layer, known) else [rows.base]
    weight = layer.weight
    if weight.device.type == "cuda":
        # A vLLM that puts its weights elsewhere after loading would load later ones there, too.
        served = expand.fits(sizes) and weight.data_ptr() == rows.full.data_ptr()
    else:
        served = weight.device.type == "cpu"
    return served and not own_forward
