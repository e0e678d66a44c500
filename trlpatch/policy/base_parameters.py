"""Base parameters: those of the model under an adapter. A LoRA request carries the adapter and nothing of them.

What is read at every rollout is read here from slots found once per walk: whether one of them is trained, and whether
one that no adapter stands on has got other storage or another version. Contents are compared when that moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from trlpatch.policy.adapter import LoraView, base_of
from trlpatch.policy.base_weights import Weight, weights_now
from trlpatch.policy.change_detection import as_integers
from trlpatch.policy.sharding import sharded_by

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

WRAPPED = ("base_layer", "original_module", "token_adapter")
"""What PEFT calls the layer inside its own: of tuners, of `modules_to_save`, and of trainable tokens, whose
`original_module` is a property."""


def base_parameters(model: Module) -> Iterator[tuple[str, Module, Parameter]]:
    """(path, module, parameter) of the transformers model under PEFT, with the paths that it has without PEFT.

    Nothing that PEFT added is among them. Shared parameters come under each of their names.
    """
    yield from _walk(base_of(model), "")


def _walk(module: Module, path: str) -> Iterator[tuple[str, Module, Parameter]]:
    for name in WRAPPED:
        inner = module._modules.get(name)
        if inner is not None:
            yield from _walk(inner, path)
            return
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{path}{leaf}", module, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}{name}.")


@dataclass(frozen=True)
class _Slots:
    """Where the parameters are kept: a parameter that is replaced is found all the same."""

    paths: list[str]
    owners: list[dict[str, Any]]
    leaves: list[str]
    beside: list[bool]
    """Is it in no layer that an adapter stands on? Those in one are watched by `base_weights.base_mark`."""


_SLOTS = "base parameter slots"
_TRAINED, _STATE = attrgetter("requires_grad"), attrgetter("_version")


def _slots(view: LoraView) -> _Slots:
    slots: _Slots | None = view.found.derived.get(_SLOTS)
    if slots is None:
        adapted = {path for path, _ in view.layers}
        found = list(base_parameters(view.base))
        slots = view.found.derived[_SLOTS] = _Slots(
            [path for path, _, _ in found],
            [owner._parameters for _, owner, _ in found],
            [path.rpartition(".")[2] for path, _, _ in found],
            [path.rpartition(".")[0] not in adapted for path, _, _ in found],
        )
    return slots


def trained_parameter(view: LoraView) -> str | None:
    """The path of a base parameter that is trained beside the adapter; None when all are frozen.

    Reads one flag of each: 30 microseconds for the 339 of a 7B model.
    """
    slots = _slots(view)
    found = list(map(dict.get, slots.owners, slots.leaves))
    try:
        if not any(map(_TRAINED, found)):
            return None
    except AttributeError:  # one of them was taken away
        pass
    return next((path for path, one in zip(slots.paths, found, strict=True) if getattr(one, "requires_grad", 0)), None)


def beside_mark(view: LoraView) -> tuple[object, ...]:
    """What is equal as long as nobody has written to base parameters that no adapter stands on, but through `.data`.

    Optimizers that do write like that train what `trained_parameter` names.
    """
    slots = _slots(view)
    found = [
        one
        for owner, leaf, beside in zip(slots.owners, slots.leaves, slots.beside, strict=True)
        if beside and (one := owner.get(leaf)) is not None
    ]
    try:
        return (list(map(id, found)), list(map(_STATE, found)))
    except RuntimeError:  # inference tensors have no version
        return (list(map(id, found)),)


def contents(base: Module) -> dict[str, Weight]:
    """What is remembered of every base parameter: matrices as `weights_now` has them, and norms, biases, experts."""
    import torch

    found = weights_now(base)
    rest = {
        path: parameter.detach()
        for path, _, parameter in base_parameters(base)
        if path.removesuffix(".weight") not in found and _readable(parameter)
    }
    with torch.no_grad():
        sums = {path: as_integers(tensor).sum(dtype=torch.int64) for path, tensor in rest.items()}
        for device in {one.device for one in sums.values()}:  # one wait for each
            there = [path for path, one in sums.items() if one.device == device]
            for path, bits in zip(there, torch.stack([sums[path] for path in there]).tolist(), strict=True):
                found[path] = Weight(rest[path].dtype, tuple(rest[path].shape), bits)
    return found


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0 and sharded_by(tensor) is None


def changed_beside(before: Mapping[str, Weight] | None, view: LoraView) -> str | None:
    """The first base parameter that no adapter stands on and that is not what it was `before` is the reason."""
    adapted = {path for path, _ in view.layers}
    changed = changed_parameter(before, view.base, without=adapted)
    return None if changed is None else f"{changed!r} is not what it was when the engine was attached"


def changed_parameter(
    before: Mapping[str, Weight] | None, base: Module, *, without: set[str] | frozenset[str] = frozenset()
) -> str | None:
    """The path of the first base parameter with another content or shape than `before`; None when there is none.

    One that was cast since is another type of the same. None, too, when nothing is known.
    """
    if not before:
        return None
    now = contents(base)
    for path, old in before.items():
        new = now.get(path)
        if path in without or new is None or new.dtype != old.dtype:
            continue
        if (new.shape, new.bits) != (old.shape, old.bits):
            return path
    return None
