"""Protect shared weights: what would change or move them raises before it has touched anything.

A merge into shared weights changes the engine's base under its rollouts. A model that moves or casts keeps no copy in
common with the engine, which nothing else would notice.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.errors import SharedWeights
from trlpatch.policy.adapter import base_of
from trlpatch.policy.base_parameters import base_parameters
from trlpatch.policy.lora_support import REWRITES_BASE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Protection:
    """What was recorded of one model when it was protected."""

    addresses: dict[str, int]
    """Path of a base parameter -> address of its data."""
    undo: tuple[RemovableHandle, ...]
    """Handles of hooks, each with `remove()`."""


_protected: weakref.WeakKeyDictionary[Module, _Protection] = weakref.WeakKeyDictionary()
_owners: weakref.WeakSet[Module] = weakref.WeakSet()
"""The modules that have shared parameters."""
_watch: list[RemovableHandle] = []
"""Handle of torch's global hook, while any model is protected."""


def protect(model: Module) -> None:
    """Make these raise SharedWeights, for this model and every PEFT model over it, also one that is made later:

    - `.to()`, `.cpu()`, `.half()` and the like, of the model or of a module in it, when they would move or cast base
      weights (a conversion that changes nothing for them passes: the Trainer moves models to where they are);
    - `merge_adapter`, `merge_and_unload` and `unmerge_adapter`;
    - `init_lora_weights` that rewrites base weights (PiSSA, OLoRA, ...);
    - `load_state_dict` with base weights, of the model or of a module in it;
    - `resize_token_embeddings` to another size.

    `copy.deepcopy` of the model has weights of its own and is not protected. Protecting twice is protecting once.
    """
    base = base_of(model)
    if base in _protected:
        return
    parameters = list(base_parameters(base))
    owners = dict.fromkeys(owner for _, owner, _ in parameters)
    _owners.update(owners)
    for module in {base: None, **owners}:  # the whole model before anything has moved, and parts of it
        module._apply = types.MethodType(_apply_unless_it_moves, module)
    if callable(getattr(base, "resize_token_embeddings", None)):
        base.resize_token_embeddings = types.MethodType(_resize_to_the_same_size, base)
    _protected[base] = _Protection(
        {path: parameter.data_ptr() for path, _, parameter in parameters},
        (
            base.register_load_state_dict_pre_hook(_refuse_base_weights),
            *(owner.register_load_state_dict_pre_hook(_refuse_own_weights) for owner in owners),
        ),
    )
    for layer in base.modules():
        if layer._modules.get("base_layer") in _owners:
            _guard(layer)
    if not _watch:
        from torch.nn.modules.module import register_module_module_registration_hook

        _watch.append(register_module_module_registration_hook(_guard_new_layer))


def unprotect(model: Module) -> None:
    """Undo `protect`."""
    base = base_of(model)
    protection = _protected.pop(base, None)
    if protection is None:
        return
    for handle in protection.undo:
        handle.remove()
    for name in ("_apply", "resize_token_embeddings"):
        base.__dict__.pop(name, None)
    for _, owner, _ in base_parameters(base):
        owner.__dict__.pop("_apply", None)
        _owners.discard(owner)
    for layer in base.modules():
        for name in _CHANGING:
            if getattr(layer.__dict__.get(name), "__func__", None) is _CHANGING[name]:
                del layer.__dict__[name]
    if not _protected:
        while _watch:
            _watch.pop().remove()


def check_frozen(model: Module) -> None:
    """Check the base parameters of a protected model; for another model this does nothing.

    About a millisecond for 300 parameters.

    Raises:
        SharedWeights: one of them is trainable, or is no longer the engine's.
    """
    base = base_of(model)
    protection = _protected.get(base)
    if protection is None:
        return
    for path, _, parameter in base_parameters(base):
        if parameter.requires_grad:
            raise SharedWeights(
                f"training {type(base).__name__}: its base parameter {path!r} has requires_grad=True, but the engine "
                "computes with the same memory; expected frozen base weights and a PEFT adapter: "
                f"call model.get_parameter({path!r}).requires_grad_(False), or train a model that shares nothing "
                "(FastLanguageModel.from_pretrained(..., share_weights=False))"
            )
        if parameter.data_ptr() != protection.addresses.get(path):
            raise SharedWeights(
                f"training {type(base).__name__}: its base parameter {path!r} was replaced after sharing, so the "
                "engine still rolls out with the old one; expected the engine's own memory; do without what replaces "
                "it (a cast or a resized embedding, for instance), or share nothing "
                "(FastLanguageModel.from_pretrained(..., share_weights=False))"
            )


# Instance methods of a protected model. A deep copy carries them along without being protected.


def _apply_unless_it_moves(self: Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Module:
    import torch

    if self in _protected or self in _owners:
        kinds = {(parameter.dtype, parameter.device): path for path, _, parameter in base_parameters(self)}
        for (dtype, device), path in kinds.items():
            probe = torch.zeros(1, dtype=dtype, device=device)
            after = fn(probe)
            if after.data_ptr() != probe.data_ptr():
                raise SharedWeights(
                    f"converting {type(self).__name__}: its base weights ({path!r} for one) are the engine's own "
                    f"memory, {dtype} on {device}; expected a conversion that leaves them there, found one to "
                    f"{after.dtype} on {after.device}; nothing was moved; load a model of its own with "
                    f"AutoModelForCausalLM.from_pretrained({getattr(self, 'name_or_path', '')!r}) for that"
                )
    return type(self)._apply(self, fn, *args, **kwargs)


def _resize_to_the_same_size(
    self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    size = self.get_input_embeddings().weight.shape[0]
    if self in _protected and new_num_tokens not in (None, size):
        raise SharedWeights(
            f"resizing the embeddings of {type(self).__name__}: they are the engine's own memory, {size} tokens; "
            f"expected to stay so, found {new_num_tokens}; add tokens to the checkpoint before the engine is built"
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)


def _refuse_base_weights(module: Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    protection = _protected.get(module)
    if protection is None:
        return
    for key in state_dict:
        path = key.removeprefix(prefix).replace(".base_layer.", ".")
        if key.startswith(prefix) and path in protection.addresses:
            raise SharedWeights(
                f"loading a state dict into {type(module).__name__}: {key!r} would overwrite base weights that the "
                "engine computes with; expected an adapter's only, as peft.get_peft_model_state_dict(model) gives"
            )


def _refuse_own_weights(module: Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    if module not in _owners:
        return
    for name in module._parameters:
        if f"{prefix}{name}" in state_dict:
            raise SharedWeights(
                f"loading a state dict into {type(module).__name__}: {prefix + name!r} would overwrite base weights "
                "that the engine computes with; expected an adapter's only, as "
                "peft.get_peft_model_state_dict(model) gives"
            )


# PEFT's layers.


def _guard_new_layer(module: Module, name: str, submodule: Module | None) -> None:
    """torch calls this whenever a module is put into another; PEFT's layers take theirs as `base_layer`."""
    if name == "base_layer" and submodule in _owners:
        _guard(module)


def _guard(layer: Module) -> None:
    for name, refusing in _CHANGING.items():
        if callable(getattr(type(layer), name, None)):
            layer.__dict__[name] = types.MethodType(refusing, layer)


def _refusing(name: str, doing: str, instead: str) -> Callable[..., Any]:
    def call_unless_shared(self: Module, *args: Any, **kwargs: Any) -> Any:
        if self._modules["base_layer"] in _owners:
            raise SharedWeights(
                f"{doing}: the base weights of this {type(self).__name__} layer are the engine's own memory, and "
                f"every rollout would use the changed ones; nothing was changed; {instead}"
            )
        return getattr(type(self), name)(self, *args, **kwargs)

    return call_unless_shared


_ELSEWHERE = (
    "save the adapter with model.save_lora(directory), load the model again without an engine, and merge there "
    "(PeftModel.from_pretrained(...).merge_and_unload())"
)
_CHANGING = {
    "merge": _refusing("merge", "merging an adapter", _ELSEWHERE),
    "unmerge": _refusing("unmerge", "unmerging an adapter", _ELSEWHERE),
} | {
    f"{way}_init": _refusing(f"{way}_init", f"init_lora_weights={way!r}", "use another init_lora_weights")
    for way in REWRITES_BASE
}
"""Method of a PEFT layer that writes into the layer under it -> what is called in its place."""
