"""Plan where each parameter of a model goes inside an engine's, and prove it once.

By the names and rows that weight sharing stands on (`sharing.names`). A plan holds only if every parameter of the
engine is written, and nothing twice with different contents; and if the engine's own loader, or what it has loaded,
says that each place is right.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trlpatch.engine.sharing.names import EngineNames, held_parameters, plain
from trlpatch.engine.weights_in_place.merge import CHUNK
from trlpatch.errors import CannotShare
from trlpatch.policy.policy_weights import PolicyWeight

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
_ABSORBED = ("W_UK_T", "W_UV")
"""What MLA attention computes from kv_b_proj once, when weights are loaded."""


class NotInPlace(Exception):  # an answer, caught by the caller
    """The engine's parameters cannot be written directly; the message says why."""


@dataclass(frozen=True)
class Plan:
    """For each of a model's parameters, in its order, a view of the engine's; None where another one writes it."""

    structure: list[tuple[str, tuple[int, ...]]]
    targets: list[Tensor | None]
    held: list[tuple[Any, int]]
    """Every parameter of the engine with its address."""

    def fits(self, weights: list[PolicyWeight]) -> bool:
        """Is it of a model with these parameters, and are the engine's still where they were?"""
        return self.structure == structure_of(weights) and all(
            parameter.data_ptr() == address for parameter, address in self.held
        )


def structure_of(weights: list[PolicyWeight]) -> list[tuple[str, tuple[int, ...]]]:
    """What a plan depends on."""
    return [(one.path, tuple(one.base.shape)) for one in weights]


def plan_for(weights: list[PolicyWeight], module: Module) -> Plan:
    """Find a place for every parameter.

    Raises:
        NotInPlace: there is none, or the engine has a parameter that would not be written, or has it in another form.
    """
    _refuse_layouts(module)
    refuse_adapted_twins(weights)
    names = EngineNames(module)
    targets: list[Tensor | None] = []
    seen: set[int] = set()
    for weight in weights:
        try:
            target: Tensor | None = names.view(weight.path, weight.base.shape)
        except CannotShare as refusal:
            if id(weight.base) not in seen:
                raise NotInPlace(str(refusal)) from refusal
            target = None  # tied, and vLLM has it once
        seen.add(id(weight.base))
        if target is not None and not target.is_contiguous():
            raise NotInPlace(f"the engine's rows of {weight.path!r} have the strides {target.stride()}")
        targets.append(target)
    held = {id(slot.parameter): slot for _, slot in held_parameters(module)}
    _require_whole(weights, targets, module)
    addresses = [(slot.parameter, slot.parameter.data_ptr()) for slot in held.values()]
    return Plan(structure_of(weights), targets, addresses)


def refuse_adapted_twins(weights: list[PolicyWeight]) -> None:
    """Raise NotInPlace where two parameters are one, and are not to be the same."""
    first: dict[int, PolicyWeight] = {}
    for weight in weights:
        twin = first.setdefault(id(weight.base), weight)
        if twin is not weight and not (twin.plain and weight.plain):
            raise NotInPlace(f"{twin.path!r} and {weight.path!r} are one weight, and an adapter is on one of them")


def _refuse_layouts(module: Module) -> None:
    for path, part in module.named_modules():
        method = getattr(part, "quant_method", None)
        if method is not None and type(method).__name__ not in _METHODS:
            raise NotInPlace(f"the engine's {path!r} has its weights in the form of {type(method).__name__}")
        if any(getattr(part, name, None) is not None for name in _ABSORBED):
            raise NotInPlace(f"the engine's {path!r} ({type(part).__name__}) keeps products of its weights")


def _require_whole(weights: list[PolicyWeight], targets: list[Tensor | None], module: Module) -> None:
    """Every element of every parameter once, but for the padding of vocabularies."""
    runs: defaultdict[int, dict[tuple[int, int], PolicyWeight]] = defaultdict(dict)
    for weight, target in zip(weights, targets, strict=True):
        if target is None:
            continue
        run = (target.data_ptr(), target.data_ptr() + target.nbytes)
        before = runs[target.untyped_storage().data_ptr()].setdefault(run, weight)
        if before.base is not weight.base:
            raise NotInPlace(f"{before.path!r} and {weight.path!r} are one parameter of the engine and two here")
    for name, slot in held_parameters(module):
        parameter = plain(slot.parameter)
        if not parameter.numel():
            raise NotInPlace(f"the engine's {name!r} is empty: vLLM has repacked it for its own kernels")
        rows = parameter
        real = getattr(slot.owner, "org_vocab_size", None)
        if real is not None and real < parameter.shape[0]:
            rows = parameter[:real]
        at, end = rows.data_ptr(), rows.data_ptr() + rows.nbytes
        for start, stop in sorted(runs[parameter.untyped_storage().data_ptr()]):
            if start < at < stop:
                raise NotInPlace(f"two parameters would be written over each other in the engine's {name!r}")
            if start == at and stop <= end:
                at = stop
        if at != end:
            raise NotInPlace(f"no parameter of the model goes into all of the engine's {name!r}")


Proven = dict[str, tuple[int, tuple[int, ...]]]
"""Path of a parameter -> address and shape of its place in the engine."""


def prove(plan: Plan, weights: list[PolicyWeight], module: Module, proven: Proven) -> None:
    """Prove each place by what is there, or by what the engine's own loader puts there; `proven` grows by them.

    A weight that is found in its place, element by element, is right: the engine has loaded it from the checkpoint.
    Of the others a pattern is loaded as vLLM loads weights, looked for, and replaced by what was there before.

    Raises:
        NotInPlace: it is not there. The engine has the weights that it had before, as far as the loader kept to them.
    """
    for number, (weight, target) in enumerate(zip(weights, plan.targets, strict=True)):
        if target is None:
            continue
        place = (target.data_ptr(), tuple(target.shape))
        if proven.get(weight.path) == place:
            continue
        if not _is_there(weight, target):
            _require_loaded(module, weight.path, target, _pattern(target, number))
        proven[weight.path] = place


def _require_loaded(module: Any, path: str, target: Tensor, pattern: Tensor) -> None:
    """Have vLLM load a pattern as it loads weights, and look for it in the target, which gets its contents back.

    The loaders of 0.23 know layers that LoRA has wrapped only by their names inside: of the outer one a weight is a
    KeyError and a bias passed over without a word.
    """
    import torch

    owner, _, leaf = path.rpartition(".")
    before = target.clone()
    failed: Exception | None = None
    try:
        for name in (path, f"{owner}.base_layer.{leaf}"):
            try:
                module.load_weights([(name, pattern)])
            except Exception as error:
                failed = failed or error
            if torch.equal(target, pattern):
                return
    finally:
        target.copy_(before)
    said = "" if failed is None else f": {failed!r}"
    raise NotInPlace(f"the engine's loader puts {path!r} elsewhere, or changes it, or refuses it{said}") from failed


def _is_there(weight: PolicyWeight, target: Tensor) -> bool:
    import torch

    here = weight.base.detach().to(device=target.device, dtype=target.dtype)
    return bool(torch.equal(here, target))


def _pattern(target: Tensor, number: int) -> Tensor:
    """Integers up to 251, exact in bfloat16, in an order of its own."""
    import torch

    whole = torch.empty_like(target)
    for start, part in zip(range(0, whole.numel(), CHUNK), whole.view(-1).split(CHUNK), strict=True):
        place = torch.arange(start, start + part.numel(), device=part.device)
        part.copy_((place % 251 * 7 + place // 251 + number * 13) % 251 + 1)
    return whole
