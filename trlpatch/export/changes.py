"""What an adapter does to each base parameter, computed in float32: plain LoRA here, every other kind by PEFT itself.

Nothing is merged into the model: a plain LoRA layer's B·A is added to a copy of its weight, and of any other layer a
copy with weights of its own is made, which PEFT's `merge` may change.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.export.base import clean_path, walk
from trlpatch.policy.adapter import base_of
from trlpatch.policy.base_parameters import WRAPPED

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Read = Callable[[str], "Tensor"]
"""Name of a parameter in a module -> a float32 copy of its base value on the CPU."""


@dataclass(eq=False)
class Site:
    """A base module that something of PEFT stands on."""

    path: str
    """Of the base module in the transformers model."""
    wrapper: Module
    """PEFT's outermost module there."""
    adapter: str
    kind: str
    """"lora", "replaced" (modules_to_save), "rows" (trainable tokens) or "peft"."""
    leaves: tuple[str, ...]
    """The parameters of the base module that may change."""
    key: object = field(default=None)
    """Equal for sites that do the same to tied parameters."""
    _waiting: dict[str, Tensor] = field(default_factory=dict)

    def merged(self, leaf: str, read: Read) -> Tensor:
        """The parameter with the adapter in it, float32 on the CPU.

        Raises:
            CannotExport: PEFT cannot merge this kind.
        """
        if self.kind == "lora":
            return _add_lora(self.wrapper, self.adapter, read(leaf))
        if self.kind == "rows":
            return _set_rows(_token_adapter(self.wrapper), self.adapter, read(leaf))
        if self.kind == "replaced":
            return _float32(self.replacement(leaf))
        if leaf not in self._waiting:
            self._waiting = _merge_by_peft(self, {name: read(name) for name in self.leaves})
        return self._waiting.pop(leaf)

    def replacement(self, leaf: str) -> Tensor:
        """The parameter that modules_to_save has in place of the base's."""
        kept: Any = self.wrapper.modules_to_save
        return dict(walk(kept[self.adapter], ""))[leaf]


def sites(model: Any, adapter: str) -> Iterator[Site]:
    """Every base module that the adapter changes, outermost wrappers first.

    Raises:
        CannotExport: something of PEFT stands there that cannot be merged.
    """
    yield from _sites(base_of(model), "", adapter)


def _sites(module: Module, path: str, adapter: str) -> Iterator[Site]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        site = _site(module, path, adapter)
        if site is not None:
            yield site
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _sites(child, clean_path(f"{path}.{name}"), adapter)


def _site(wrapper: Any, path: str, adapter: str) -> Site | None:
    inner = _innermost(wrapper)
    leaves = tuple(name for name, _ in walk(inner, ""))
    token = _token_adapter(wrapper)
    if token is not None:
        # PEFT gives the tied module of an embedding a layer that refers to the embedding's.
        return Site(path, wrapper, adapter, "rows", ("weight",), key=_identity(token.trainable_tokens_delta, adapter))
    if hasattr(wrapper, "modules_to_save"):
        if adapter not in wrapper.modules_to_save:
            return None
        kept = wrapper.modules_to_save[adapter]
        if any(True for _ in _tuners(kept)):
            raise CannotExport(
                f"merging the adapter {adapter!r}: {path!r} is in modules_to_save and holds a tuner layer as well; "
                "expected one of the two; merge it with PEFT (merge_and_unload) and export the model of that"
            )
        first = next(iter(dict(walk(kept, "")).values()), None)
        return Site(path, wrapper, adapter, "replaced", leaves, key=id(first))
    if not _carries(wrapper, adapter):
        return None
    if _is_plain_lora(wrapper, adapter):
        return Site(path, wrapper, adapter, "lora", ("weight",), key=id(wrapper))
    _refuse_unmergeable(wrapper, path, adapter)
    return Site(path, wrapper, adapter, "peft", leaves, key=id(wrapper))


def _identity(parameters: Any, adapter: str) -> object:
    return id(parameters[adapter]) if adapter in parameters else None


def _token_adapter(wrapper: Any) -> Any:
    """The layer that holds the trained rows of an embedding; None where the wrapper is something else."""
    layer = getattr(wrapper, "token_adapter", wrapper)
    return layer if hasattr(layer, "trainable_tokens_delta") else None


def _innermost(wrapper: Any) -> Module:
    module = wrapper
    while True:
        inner = next((module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None)
        if inner is None:
            found: Module = module
            return found
        module = inner


def _tuners(module: Module) -> Iterator[Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (one for one in module.modules() if isinstance(one, BaseTunerLayer))


def _carries(wrapper: Any, adapter: str) -> bool:
    """Has a tuner layer, or one that is nested in it, parameters of this adapter?"""
    layer = wrapper
    while layer is not None and hasattr(layer, "adapter_layer_names"):
        for name in layer.adapter_layer_names:
            try:
                if adapter in getattr(layer, name, ()):
                    return True
            except TypeError:
                pass
        layer = layer._modules.get("base_layer")
    return False


def _is_plain_lora(layer: Any, adapter: str) -> bool:
    return (
        type(layer).__name__ == "Linear"
        and type(layer).__module__.startswith("peft.tuners.lora.")
        and adapter not in getattr(layer, "lora_variant", {})
        and not layer.use_dora.get(adapter, False)
        and not layer.fan_in_fan_out
        and layer.lora_A[adapter].weight.dim() == 2
        and getattr(layer.lora_B[adapter], "bias", None) is None
        and not any(True for _ in _tuners(layer.base_layer))
    )


def _refuse_unmergeable(layer: Any, path: str, adapter: str) -> None:
    trained = getattr(layer.lora_B[adapter], "bias", None) if adapter in getattr(layer, "lora_B", {}) else None
    if trained is not None and getattr(_innermost(layer), "bias", None) is None:
        raise CannotExport(
            f"merging the adapter {adapter!r}: lora_bias=True trains a bias for {path!r}, which has none in the base "
            'model, so no checkpoint of this architecture can hold it; export the adapter alone (save_method="lora")'
        )
    if not callable(getattr(layer, "merge", None)):
        raise CannotExport(
            f"merging the adapter {adapter!r}: {path!r} is a {type(layer).__name__} of PEFT's, which has no merge(); "
            'export the adapter alone (save_method="lora")'
        )


def _float32(tensor: Tensor) -> Tensor:
    import torch

    found = tensor.detach().to("cpu")
    return found.to(torch.float32) if found.is_floating_point() else found


def _add_lora(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """W + B·A·scaling, operation by operation as `peft.tuners.lora.Linear.merge` has it in float32; into `weight`."""
    import torch

    with torch.no_grad():
        delta = _float32(layer.lora_B[adapter].weight) @ _float32(layer.lora_A[adapter].weight)
        delta *= layer.scaling[adapter]
        return weight.add_(delta)


def _set_rows(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    import torch

    if adapter not in layer.token_indices:
        return weight
    return weight.index_copy_(
        0, torch.tensor(layer.token_indices[adapter]), _float32(layer.trainable_tokens_delta[adapter])
    )


def _merge_by_peft(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    inner = _innermost(site.wrapper)
    layer: Any = copy.deepcopy(site.wrapper, {id(inner): _shell(inner, tensors, "")})
    layer.to(device="cpu", dtype=torch.float32)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same of every layer, about what is no fault here
            if hasattr(layer, "unload_and_optionally_merge_module"):
                module = layer.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=[site.adapter]
                )
            else:
                layer.merge(safe_merge=False, adapter_names=[site.adapter])
                module = layer.get_base_layer()
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        raise CannotExport(
            f"merging the adapter {site.adapter!r}: PEFT's {type(site.wrapper).__name__} cannot merge into "
            f'{site.path!r}: {error}; export the adapter alone (save_method="lora")'
        ) from error
    return {name: _float32(tensor) for name, tensor in walk(module, "")}


def _shell(module: Module, tensors: Mapping[str, Tensor], path: str) -> Module:
    """A copy of a base module around other parameters, without what libraries have put on the instance."""
    from torch.nn import Parameter

    shell = module.__class__.__new__(module.__class__)
    shell.__dict__.update({name: value for name, value in vars(module).items() if not callable(value)})
    shell._parameters = {
        leaf: None if old is None else Parameter(tensors[f"{path}{leaf}"], requires_grad=False)
        for leaf, old in module._parameters.items()
    }
    shell._buffers = {leaf: tensors.get(f"{path}{leaf}", old) for leaf, old in module._buffers.items()}
    shell._modules = {
        name: None if child is None else _shell(child, tensors, f"{path}{name}.")
        for name, child in module._modules.items()
    }
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(shell, name, type(getattr(module, name))())
    return shell
