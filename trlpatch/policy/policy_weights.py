"""Policy weights: each parameter as the model computes with it now, an adapter as the product that is added to it.

Nothing is merged here: a `PolicyWeight` says what the merged parameter is, from the trained tensors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter import base_of, lora_view
from trlpatch.policy.change_detection import ContentSums, Sums, as_integers
from trlpatch.policy.sharding import sharded_by

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_CONTAINERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LINEAR = ("peft.tuners.lora.layer", "Linear")
_EMBEDDING = ("peft.tuners.lora.layer", "Embedding")


class NotMergeable(Exception):  # an answer, caught by the caller
    """A parameter of the policy cannot be computed from what is in this process; the message says which and why."""


@dataclass(frozen=True)
class Term:
    """A low-rank product that an adapter adds: `scale * left @ right`."""

    left: Tensor
    """[out, r]"""
    right: Tensor
    """[r, in]"""
    scale: float


@dataclass(frozen=True)
class PolicyWeight:
    """One parameter of the policy: `base + sum(terms)`, with DoRA each row brought to the length of `magnitude`."""

    path: str
    """In the transformers model without PEFT."""
    base: Tensor
    terms: tuple[Term, ...] = ()
    magnitude: Tensor | None = None
    """[out], DoRA's."""

    @property
    def plain(self) -> bool:
        """Is it `base` itself?"""
        return not self.terms and self.magnitude is None


def policy_weights(model: Any, *, adapters: bool = True) -> list[PolicyWeight]:
    """Every parameter of the model under wrappers and PEFT; shared ones under each of their names.

    What the forward pass does: `disable_adapter()`, merged adapters, several active ones, `modules_to_save`, trained
    biases. `adapters=False` gives the model without any.

    Raises:
        NotMergeable: a kind of adapter, of layer or of storage that is not known here.
    """
    view = lora_view(model)
    for name in () if view is None else view.active or view.configs:
        config = view.configs.get(name) if view is not None else None
        if getattr(config, "is_prompt_learning", False):
            raise NotMergeable(f"{type(config).__name__} learns a prompt, which no weight holds")
    found = list(_walk(base_of(model), "", adapters))
    for weight in found:
        for tensor in _tensors(weight):
            _require_here(weight.path, tensor)
    return found


def _walk(module: Module, path: str, adapters: bool) -> Iterator[PolicyWeight]:
    kind = type(module).__name__
    if kind == "FullyShardedDataParallel":
        raise NotMergeable("the parameters are sharded by FSDP")
    if "original_module" in module._modules:
        yield from _walk(_saved(module, path, kind, adapters), path, adapters)
        return
    if "base_layer" in module._modules:
        yield from _adapted(module, path, adapters)
        return
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield PolicyWeight(f"{path}{leaf}", _checked(f"{path}{leaf}", module, parameter))
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, path if name in _CONTAINERS else f"{path}{name}.", adapters)


def _saved(module: Any, path: str, kind: str, adapters: bool) -> Module:
    """The module that a wrapper of `modules_to_save` calls."""
    if kind != "ModulesToSaveWrapper":
        raise NotMergeable(f"{path.rstrip('.')!r} is trained through PEFT's {kind}")
    active = list(module.active_adapters)
    chosen = module.original_module
    if adapters and active and not module.disable_adapters and active[0] in module.modules_to_save:
        chosen = module.modules_to_save[active[0]]
    return chosen


def _adapted(layer: Any, path: str, adapters: bool) -> Iterator[PolicyWeight]:
    inner, name = layer._modules["base_layer"], path.rstrip(".")
    if "base_layer" in inner._modules:
        raise NotMergeable(f"{name!r} is adapted twice, by layers in one another")
    active = [one for one in layer.active_adapters if _has(layer, one)]
    if layer.merged:
        if not adapters or layer.disable_adapters:
            raise NotMergeable(f"an adapter is merged into {name!r}, whose own weight is not there")
        active = []  # the forward pass is the base layer's
    if not adapters or layer.disable_adapters:
        active = []
    terms, magnitude, bias = _terms(layer, name, active)
    if bias and inner._parameters.get("bias") is None:
        raise NotMergeable(f"lora_bias of {name!r}, which has no bias")
    for leaf, parameter in inner._parameters.items():
        if parameter is None:
            continue
        base = _checked(f"{path}{leaf}", inner, parameter)
        if leaf == "weight":
            yield PolicyWeight(f"{path}{leaf}", base, terms, magnitude)
        else:
            yield PolicyWeight(f"{path}{leaf}", base, bias if leaf == "bias" else ())
    if inner._modules:
        raise NotMergeable(f"{name!r} is a {type(inner).__name__} with layers of its own")


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, kind, ()) for kind in ("lora_A", "lora_embedding_A"))


def _terms(layer: Any, name: str, active: list[str]) -> tuple[tuple[Term, ...], Tensor | None, tuple[Term, ...]]:
    """(terms of the weight, DoRA's magnitude, terms of the bias)."""
    import torch

    kind = (type(layer).__module__, type(layer).__name__)
    if kind not in (_LINEAR, _EMBEDDING):
        raise NotMergeable(f"{name!r} is adapted by {'.'.join(kind)}")
    if getattr(layer, "fan_in_fan_out", False):
        raise NotMergeable(f"{name!r} holds its weight transposed (fan_in_fan_out)")
    terms, bias, magnitude = [], [], None
    for adapter in active:
        scale = float(layer.scaling[adapter])
        if kind == _EMBEDDING:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            left, right = a.detach().T, b.detach().T
        else:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            left, right = b.detach(), a.detach()
            extra = layer.lora_B[adapter].bias
            if extra is not None:
                bias.append(Term(extra.detach()[:, None], torch.ones_like(extra[:1, None]), scale))
        terms.append(Term(left, right, scale))
        magnitude = _magnitude(layer, name, adapter, kind) if magnitude is None else magnitude
    if magnitude is not None and len(active) > 1:
        raise NotMergeable(f"several adapters are active in {name!r}, DoRA among them")
    return tuple(terms), magnitude, tuple(bias)


def _magnitude(layer: Any, name: str, adapter: str, kind: tuple[str, str]) -> Tensor | None:
    variant = (getattr(layer, "lora_variant", None) or {}).get(adapter)
    vectors = getattr(layer, "lora_magnitude_vector", None) or {}
    if variant is None and adapter not in vectors:
        return None
    if kind != _LINEAR or adapter not in vectors or type(variant).__name__ not in ("NoneType", "DoraLinearVariant"):
        raise NotMergeable(f"{name!r} uses the LoRA variant {type(variant).__name__}")
    vector: Tensor = vectors[adapter].weight.detach()
    return vector


def _checked(path: str, owner: Module, parameter: Any) -> Tensor:
    import torch

    # Layers of other kinds may hold a square weight transposed (GPT-2's Conv1D), which no shape gives away.
    if parameter.dim() > 1 and not isinstance(owner, (torch.nn.Linear, torch.nn.Embedding)):
        raise NotMergeable(f"{path!r} belongs to a {type(owner).__name__}, not to a linear layer or an embedding")
    return parameter


def _tensors(weight: PolicyWeight) -> Iterator[Tensor]:
    yield weight.base
    for term in weight.terms:
        yield term.left
        yield term.right
    if weight.magnitude is not None:
        yield weight.magnitude


def _require_here(path: str, tensor: Any) -> None:
    import torch

    if (by := sharded_by(tensor)) is not None:
        raise NotMergeable(f"the parameters are sharded by {by}")
    if tensor.is_meta or tensor.numel() == 0:
        raise NotMergeable(f"{path!r} holds no data in this process")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotMergeable(f"{path!r} is kept as {tensor.dtype}")


class ContentMark:
    """What is equal as long as the policy is: its structure, and the bits of what is trained.

    Factors of adapters are summed by place, which sees any change; parameters that are trained whole by their bits.
    Frozen parameters count by their storage and version: what writes to them otherwise than through `.data` is seen.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, weights: list[PolicyWeight]) -> None:
        import torch

        self._structure = [
            (one.path, one.base.data_ptr(), one.base.dtype, [term.scale for term in one.terms], one.magnitude is None)
            for one in weights
        ]
        self._versions = [_version_of(one.base) for one in weights if not one.base.requires_grad]
        factors = [tensor for one in weights if not one.plain for tensor in list(_tensors(one))[1:]]
        whole = {id(one.base): one.base.detach() for one in weights if one.base.requires_grad}
        with torch.inference_mode(False), torch.no_grad():
            self._sums: list[Sums] = ContentSums(factors).now() if factors else []
            self._sums += bit_sums(list(whole.values()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ContentMark):
            return NotImplemented
        return self._structure == other._structure and self._versions == other._versions and self._sums == other._sums


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have none


def bit_sums(tensors: list[Tensor]) -> list[Sums]:
    """Sums of each tensor's bits, by device; they see what version counters do not, as a fused optimizer's step."""
    import torch

    found = []
    with torch.inference_mode(False), torch.no_grad():
        for device in sorted({str(tensor.device) for tensor in tensors}):
            there = [tensor.detach() for tensor in tensors if str(tensor.device) == device]
            found.append(Sums(torch.stack([_bits_of(tensor) for tensor in there])))
    return found


def _bits_of(tensor: Tensor) -> Tensor:
    """Sum words of 64 bits, and their upper halves: of narrower integers torch first writes a copy four times as big.

    Sums of words are modulo 2**64, where the signs of an even number of their last elements cancel: the upper halves'
    are exact, so that both together are the exact sums of both halves.
    """
    import torch

    flat = tensor.contiguous().view(-1)
    per_word = 8 // flat.element_size()
    odd = flat.numel() % per_word
    if flat.storage_offset() % per_word or flat.numel() == odd:
        return as_integers(flat).sum(dtype=torch.int64).expand(2)
    words = flat[: flat.numel() - odd].view(torch.int64)
    sums = torch.stack([words.sum(), (words >> 32).sum()])
    return sums + as_integers(flat[-odd:]).sum(dtype=torch.int64) if odd else sums
