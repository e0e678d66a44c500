"""The LoRA adapter inside a training model: its layers, whether they changed, copies of their tensors."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

# Containers that DDP, torch.compile, FSDP1 and activation checkpointing put around modules, inside a dotted
# path.
_WRAPPER_PART = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def unwrap(model: Any) -> Any:
    """The model inside DDP, DeepSpeed, FSDP1 and torch.compile wrappers."""
    while True:
        children = getattr(model, "_modules", None) or {}
        inner = children.get("_orig_mod")
        if inner is None:
            inner = children.get("_fsdp_wrapped_module")
        if inner is None and len(children) == 1:  # DDP, DataParallel, DeepSpeedEngine: one child called "module"
            inner = children.get("module")
        if inner is None:
            return model
        model = inner


def base_of(model: Any) -> Any:
    """The transformers model under wrappers and PEFT: the object that PEFT puts its layers into."""
    model = unwrap(model)
    get_base_model = getattr(model, "get_base_model", None)
    return unwrap(get_base_model()) if callable(get_base_model) else model


@dataclass(frozen=True)
class LoraView:
    """The PEFT layers of one model.

    `configs` maps adapter names to PEFT configs; `layers` holds (path in the transformers model, PEFT layer).
    """

    base: Any
    configs: dict[str, Any]
    layers: tuple[tuple[str, Any], ...]

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that the forward pass adds, each once."""
        names: dict[str, None] = {}
        for _, layer in self.layers:
            names.update(dict.fromkeys(layer.active_adapters))
        return tuple(names)

    @property
    def disabled(self) -> bool:
        """True inside `with model.disable_adapter():`, when the policy is the base model."""
        return bool(self.layers) and all(layer.disable_adapters for _, layer in self.layers)

    def pairs(self, adapter: str) -> list[tuple[str, Any, Any, float]]:
        """(path, lora_A weight [r, in], lora_B weight [out, r], scaling) of every linear layer of the
        adapter.
        """
        return [
            (path, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, float(layer.scaling[adapter]))
            for path, layer in self.layers
            if adapter in getattr(layer, "lora_A", {})
        ]


def lora_view(model: Any) -> LoraView | None:
    """The PEFT layers of a model (wrapped or not), or None when the model has no PEFT adapter at all."""
    if sys.modules.get("peft") is None:
        return None
    outer, base = unwrap(model), base_of(model)
    configs = getattr(outer, "peft_config", None)
    if not isinstance(configs, dict) or not callable(getattr(base, "named_modules", None)):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = tuple(
        (_WRAPPER_PART.sub("", path).lstrip("."), module)
        for path, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
    )
    # `merge_and_unload()` leaves `peft_config` on the base model and takes the layers away.
    if not layers and outer is base:
        return None
    return LoraView(base, configs, layers)


def fingerprint(view: LoraView) -> tuple[object, ...]:
    """Equal as long as the active adapter is unchanged.

    Looks at the content (the sum of each parameter's bits), because torch's version counters do not tell: fused AdamW,
    the default of transformers, writes without moving them, and so do `param.data` and optimizers of other libraries.
    """
    import torch

    marks: list[object] = [view.active, view.disabled]
    sums: list[Any] = []
    with torch.no_grad():
        for adapter in view.active:
            for path, a, b, scaling in view.pairs(adapter):
                marks.append((path, scaling, a.data_ptr(), b.data_ptr()))
                sums += [_bits(weight).sum(dtype=torch.int64) for weight in (a, b)]
        if sums:
            device = sums[0].device
            marks.append(tuple(torch.stack([total.to(device) for total in sums]).tolist()))
    return tuple(marks)


def _bits(weight: Any) -> Any:
    import torch

    return weight.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


@dataclass(frozen=True)
class AdapterTensors:
    """Copies that vLLM may keep and scale.

    `tensors` has PEFT's key names; every A is [rank, in] in the training dtype, every B [out, rank] in
    float32 with the layer's scaling multiplied in, so vLLM is told `lora_alpha = rank` and scales by one.
    That is right for rsLoRA, `rank_pattern` and `alpha_pattern` on every release (vLLM below 0.32 ignores the
    patterns), and rounds once.
    """

    tensors: dict[str, Any]
    rank: int
    targets: tuple[str, ...]
    """Last components of the adapted modules' paths, sorted."""


def adapter_tensors(view: LoraView, adapter: str) -> AdapterTensors:
    """Scaled copies of the adapter, padded with zeros to one rank.

    vLLM multiplies lora_B in place, and its `.to(device, dtype)` returns the caller's own tensor when nothing
    changes: the training weights themselves must never be handed over.
    """
    import torch

    pairs = view.pairs(adapter)
    rank = max(a.shape[0] for _, a, _, _ in pairs)
    tensors: dict[str, Any] = {}
    with torch.no_grad():
        for path, a, b, scaling in pairs:
            own_a = a.detach().clone()
            own_b = b.detach().to(torch.float32) * scaling
            missing = rank - a.shape[0]
            if missing:
                own_a = torch.cat([own_a, own_a.new_zeros(missing, own_a.shape[1])], dim=0)
                own_b = torch.cat([own_b, own_b.new_zeros(own_b.shape[0], missing)], dim=1)
            tensors[f"base_model.model.{path}.lora_A.weight"] = own_a.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = own_b.contiguous()
    targets = tuple(sorted({path.rpartition(".")[2] for path, *_ in pairs}))
    return AdapterTensors(tensors, rank, targets)
