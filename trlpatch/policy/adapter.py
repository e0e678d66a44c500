"""Read the LoRA adapter inside a training model: its layers and its tensors.

Walking a 7B model takes milliseconds and would happen before every rollout, so what only a registered, replaced or
deleted module can change is kept per base model (`PeftLayers`) and checked instead of walked again.
"""

from __future__ import annotations

import re
import sys
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, Protocol

from trlpatch.policy.layer_state import Contents, Guard, addresses_of
from trlpatch.policy.registrations import registrations
from trlpatch.policy.sharding import local_of, shape_of, sharded_by

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# Containers that DDP, torch.compile, FSDP1 and activation checkpointing put around modules, inside a dotted path.
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
    return _under_peft(unwrap(model))


def _under_peft(outer: Any) -> Any:
    get_base_model = getattr(outer, "get_base_model", None)
    return unwrap(get_base_model()) if callable(get_base_model) else outer


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """The parameters of one adapter, one entry per adapted layer: the training tensors themselves, only to be read.

    As long as these are the same tensors at the same addresses with the same scalings, the same object is returned:
    what depends on nothing else may be kept with it (`derived`).
    """

    paths: tuple[str, ...]
    """In the transformers model."""
    a: list[Tensor]
    """lora_A weights, [r, in]."""
    b: list[Tensor]
    """lora_B weights, [out, r]."""
    scalings: list[float]
    addresses: list[int]
    """Of every A, then of every B: of the part in this process, 0 where there is none; empty without storage."""
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What was computed from the identity of these tensors, not from their values."""

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Every A, then every B."""
        return [*self.a, *self.b]

    @cached_property
    def rank(self) -> int:
        """The largest rank, after rank_pattern."""
        return max(int(shape_of(a)[0]) for a in self.a)

    @cached_property
    def sharded(self) -> str | None:
        """What has split some of them over ranks; None when all are whole."""
        return next(filter(None, map(sharded_by, self.parameters)), None)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Last components of the adapted modules' paths, sorted."""
        return tuple(sorted({path.rpartition(".")[2] for path in self.paths}))


class CopyUnderway(Protocol):
    """A copy of an adapter into an engine that the device makes while the host looks whether it is still the one."""

    @property
    def weights(self) -> LoraWeights:
        """What is copied."""

    def base_glance(self, spots: object) -> object | None:
        """Wait for it; equal as long as the `spots` of the base weights hold the same bits. None: it read none."""

    def finish(self, weights: LoraWeights) -> Any | None:
        """Wait for it, and return what handing over `weights` does.

        None where it was of other weights, or went where the engine does not look for them any more; and the second
        time, when they may have been trained since.
        """


_WEIGHT, _SCALING = itemgetter("weight"), itemgetter("scaling")


class _Sites:
    """Where the parameters of one adapter are found, and what was found there last.

    Reads what `nn.Module` keeps in dictionaries, which are the same as long as the modules are: a tenth of the time
    that `nn.Module.__getattr__` takes.
    """

    def __init__(self, layers: tuple[tuple[str, Module], ...], adapter: str) -> None:
        adapted = [(path, layer) for path, layer in layers if adapter in getattr(layer, "lora_A", {})]
        self._paths = tuple(path for path, _ in adapted)
        self._sides = [layer.lora_A._modules for _, layer in adapted] + [layer.lora_B._modules for _, layer in adapted]
        self._attributes = [vars(layer) for _, layer in adapted]
        self._linears: list[Module] = []
        self._parameters: list[dict[str, Any]] = []
        self._last: LoraWeights | None = None
        self._dtypes: list[Any] = []
        self.containers: list[object] | None = None
        """Dictionaries that the parameters were found in; None where some were found elsewhere."""

    def read(self, adapter: str) -> LoraWeights:
        of_adapter = itemgetter(adapter)
        linears = list(map(of_adapter, self._sides))
        if linears != self._linears:
            self._linears, self._parameters = linears, [linear._parameters for linear in linears]
        try:
            found = list(map(_WEIGHT, self._parameters))
            self.containers = [*self._sides, *self._parameters]
        except KeyError:
            self.containers = None
            found = [linear.weight for linear in linears]
        # PEFT's `rescale_adapter_scale` replaces the dictionary itself, and puts the old one back afterwards.
        scalings = list(map(of_adapter, map(_SCALING, self._attributes)))
        addresses = _addresses(found)
        # A model that was moved and cast keeps its parameters, and can get the same addresses back.
        dtypes = list(map(_DTYPE, found))
        last = self._last
        if (
            last is None
            or addresses != last.addresses
            or scalings != last.scalings
            or dtypes != self._dtypes
            or not all(map(is_, found, last.parameters))
        ):
            half = len(found) // 2
            last = self._last = LoraWeights(self._paths, found[:half], found[half:], scalings, addresses)
            self._dtypes = dtypes
        return last


_DTYPE = attrgetter("dtype")


def _addresses(weights: list[Tensor]) -> list[int]:
    try:
        # DTensors have the address 0. ZeRO-3 gives a parameter other storage whenever it is gathered and released.
        found = addresses_of(weights)
        if 0 in found or (weights and hasattr(weights[0], "ds_id")):
            found = addresses_of([local_of(weight) for weight in weights])
    except RuntimeError:  # no storage, of a kind that is not known here
        return []
    return found


@dataclass(frozen=True)
class LayerState:
    """What PEFT layers say at one moment, and the parameters of the active adapter."""

    active: tuple[str, ...]
    """Names of the adapters that the forward pass adds, each once."""
    switches: list[bool]
    """Is the adapter disabled, layer by layer?"""
    merged: bool
    """Is an adapter merged into the base weights of some layer?"""
    weights: LoraWeights | None
    """Of the adapter that is active; None when it is none or several."""
    guard: Guard | None
    """None when the layers have to be asked each time: they keep these things elsewhere than PEFT's do."""

    @cached_property
    def disabled(self) -> bool:
        """Is the adapter disabled in every layer?"""
        return bool(self.switches) and all(self.switches)

    def stands(self) -> bool:
        """Would the layers say the same now?"""
        return self.guard is not None and self.guard.holds()


# PEFT's properties of a layer, and where the layer keeps what they say.
_KEPT_AS = {"active_adapter": "_active_adapter", "disable_adapters": "_disable_adapters", "merged": "merged_adapters"}


class PeftLayers:
    """The PEFT layers of one base model as a walk found them."""

    def __init__(self, base: Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        everything = list(base.named_modules())
        self._watch = registrations.watch(module for _, module in everything)
        found = [(path, module) for path, module in everything if isinstance(module, BaseTunerLayer)]
        self.layers = tuple((_WRAPPER_PART.sub("", path).lstrip("."), module) for path, module in found)
        self._modules = [module for _, module in found]
        self._attributes = [vars(module) for module in self._modules]
        self._sites: dict[str, _Sites] = {}
        self.derived: dict[str, Any] = {}
        """What was computed from the layers' being these."""
        # Every step of every path, to notice deletions. Holds no reference to `base`, whose key in `_walks` is weak.
        parents: list[object] = []
        for path, _ in found:
            module = base
            for name in path.split(".") if path else ():
                parents.append(module._modules)
                module = module._modules[name]
        self._children = Contents(parents)
        self._state: LayerState | None = None

    def is_current(self) -> bool:
        """Would a walk find the same layers again?"""
        return not self._watch.moved and self._children.are_the_same()

    def look(self) -> LayerState:
        """What the layers say now; what they said last, the same object, when nothing has moved."""
        if self._state is None or not self._state.stands():
            self._state = None
            active, switches, merged = self.active(), self.state("disable_adapters"), any(self.state("merged"))
            weights = self.weights(active[0]) if len(active) == 1 else None
            self._state = LayerState(active, switches, merged, weights, self._guard(active, weights))
        return self._state

    def _guard(self, active: tuple[str, ...], weights: LoraWeights | None) -> Guard | None:
        sites = None if weights is None else self._sites[active[0]].containers
        if sites is None or weights is None or not weights.addresses or weights.sharded:
            return None
        try:
            return Guard(self._attributes, sites, weights.parameters, weights.addresses)
        except (KeyError, TypeError):
            return None

    def active(self) -> tuple[str, ...]:
        """Names of the adapters that the forward pass adds, each once."""
        found = self.state("active_adapter")  # a name, or a list of them
        if found and found.count(found[0]) == len(found):
            del found[1:]
        return tuple(dict.fromkeys(name for names in found for name in ([names] if isinstance(names, str) else names)))

    def weights(self, adapter: str) -> LoraWeights:
        """The parameters of an adapter now."""
        sites = self._sites.get(adapter)
        if sites is not None:
            try:
                return sites.read(adapter)
            except KeyError:  # deleted from some layers, which registers nothing
                pass
        sites = self._sites[adapter] = _Sites(self.layers, adapter)
        return sites.read(adapter)

    def state(self, name: str) -> list[Any]:
        """One of PEFT's properties of every layer; it, or the list that it is true for."""
        try:
            return list(map(itemgetter(_KEPT_AS[name]), self._attributes))
        except KeyError:  # a layer says what its class says
            pass
        return list(map(attrgetter(name), self._modules))


_walks: weakref.WeakKeyDictionary[Module, PeftLayers] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LoraView:
    """The PEFT layers of one model; `configs` maps adapter names to PEFT configs, `found` holds the layers."""

    base: Module
    configs: dict[str, Any]
    found: PeftLayers

    @property
    def sharded(self) -> str | None:
        """What has split the active adapter over ranks; None when it is whole, or not one adapter."""
        return self.weights(self.active[0]).sharded if len(self.active) == 1 else None

    @property
    def layers(self) -> tuple[tuple[str, Module], ...]:
        """(path in the transformers model, PEFT layer), in the model's order."""
        return self.found.layers

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that the forward pass adds, each once."""
        return self.found.active()

    @property
    def disabled(self) -> bool:
        """True inside `with model.disable_adapter():`, when the policy is the base model."""
        return bool(self.switches) and all(self.switches)

    @property
    def switches(self) -> list[bool]:
        """Is the adapter disabled, layer by layer?"""
        return self.found.state("disable_adapters")

    @property
    def merged(self) -> bool:
        """Is an adapter merged into the base weights of some layer?"""
        return any(self.found.state("merged"))

    def weights(self, adapter: str) -> LoraWeights:
        """The parameters of every linear layer of the adapter."""
        return self.found.weights(adapter)

    def pairs(self, adapter: str) -> list[tuple[str, Tensor, Tensor, float]]:
        """(path, lora_A weight [r, in], lora_B weight [out, r], scaling) of every linear layer of the adapter."""
        weights = self.weights(adapter)
        return list(zip(weights.paths, weights.a, weights.b, weights.scalings, strict=True))

    def snapshot(self, underway: CopyUnderway | None = None, *, every_rank: bool = False) -> LoraSnapshot:
        """Take the view of this moment, for one call that asks the same things many times.

        `underway` is a copy that the same call has started. `every_rank` says that all ranks are in this call, so
        that shards may be gathered.
        """
        return LoraSnapshot(self.base, self.configs, self.found, underway, every_rank)


@dataclass(frozen=True)
class LoraSnapshot(LoraView):
    """A view that asks the model each thing once, and from then on says what it was."""

    underway: CopyUnderway | None = None
    every_rank: bool = False

    @cached_property
    def _state(self) -> LayerState:
        return self.found.look()

    @property
    def active(self) -> tuple[str, ...]:
        """As LoraView.active."""
        return self._state.active

    @property
    def disabled(self) -> bool:
        """As LoraView.disabled."""
        return self._state.disabled

    @property
    def switches(self) -> list[bool]:
        """As LoraView.switches."""
        return self._state.switches

    @property
    def merged(self) -> bool:
        """As LoraView.merged."""
        return self._state.merged

    def weights(self, adapter: str) -> LoraWeights:
        """As LoraView.weights; those of another adapter than the active one are not kept."""
        weights = self._state.weights
        return weights if weights is not None and (adapter,) == self.active else super().weights(adapter)


def lora_view(model: Any) -> LoraView | None:
    """The PEFT layers of a model (wrapped or not), or None when the model has no PEFT adapter at all."""
    if sys.modules.get("peft") is None:
        return None
    outer = unwrap(model)
    base = _under_peft(outer)
    configs = getattr(outer, "peft_config", None)
    if not isinstance(configs, dict) or not callable(getattr(base, "named_modules", None)):
        return None
    found = _walks.get(base)
    if found is None or not found.is_current():
        found = _walks[base] = PeftLayers(base)
    # `merge_and_unload()` leaves `peft_config` on the base model and takes the layers away.
    if not found.layers and outer is base:
        return None
    return LoraView(base, configs, found)
