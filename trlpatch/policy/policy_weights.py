"""Policy weights: each parameter as the model computes with it now, an adapter as the product that is added to it.

Nothing is merged here: a `PolicyWeight` says what the merged parameter is, from the trained tensors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter import base_of, lora_view
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
    """A low-rank product that an adapter adds: `scale * left @ right`. Its tensors may require gradients."""

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
        for tensor in tensors_of(weight):
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
    inside = layer._modules.get("lora_A")
    if inside is not None and adapter in inside._modules:
        return True
    return any(adapter in getattr(layer, kind, ()) for kind in ("lora_A", "lora_embedding_A"))


def _factor(layer: Any, kind: str, adapter: str) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a factor, past `Module.__getattr__`, which takes most of a walk over a model.

    Only what torch computes from other parameters (parametrizations) is no parameter of its own.
    """
    side = layer._modules[kind]._modules[adapter]
    own = side._parameters
    # `own.get` with a default would ask the module each time.
    weight = own["weight"] if "weight" in own else side.weight  # noqa: SIM401
    return weight, own["bias"] if "bias" in own else side.bias  # noqa: SIM401


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
            right, _ = _factor(layer, "lora_A", adapter)
            left, extra = _factor(layer, "lora_B", adapter)
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


def tensors_of(weight: PolicyWeight) -> Iterator[Tensor]:
    """What the parameter is computed from, the base first."""
    yield weight.base
    for term in weight.terms:
        yield term.left
        yield term.right
    if weight.magnitude is not None:
        yield weight.magnitude


def _require_here(path: str, tensor: Any) -> None:
    import torch

    # ZeRO-3 gives parameters attributes, FSDP2 a class of their own; hasattr of what is not there is slow.
    whole = type(tensor) in (torch.nn.Parameter, torch.Tensor) and not tensor.__dict__
    if not whole and (by := sharded_by(tensor)) is not None:
        raise NotMergeable(f"the parameters are sharded by {by}")
    if tensor.is_meta or tensor.numel() == 0:
        raise NotMergeable(f"{path!r} holds no data in this process")
    if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float16):
        raise NotMergeable(f"{path!r} is kept as {tensor.dtype}")
