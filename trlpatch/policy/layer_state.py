"""Layer state: what a walk over PEFT layers read last, and whether reading it again would give the same.

After a training step nothing of a model is in the processor's caches, and a check before a rollout costs what it
touches: some thousand small objects. So it asks for identities, of all at once, and reads nothing that has not moved.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Where a PEFT layer keeps its properties `active_adapter`, `disable_adapters` and `merged`, and its scalings.
_KEPT = itemgetter("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class Contents:
    """What some dictionaries and lists hold, by identity.

    `gc.get_referents` lists the values of hundreds of dictionaries in one call: a third of the time of a lookup in
    each, and half of that when they are not in the caches.
    """

    def __init__(self, containers: Iterable[object]) -> None:
        self._containers = list({id(container): container for container in containers}.values())
        self._held = gc.get_referents(*self._containers)

    def are_the_same(self) -> bool:
        """Do the containers hold the same objects as before, in the same order?"""
        found = gc.get_referents(*self._containers)
        return len(found) == len(self._held) and all(map(is_, found, self._held))


def addresses_of(tensors: list[Tensor]) -> list[int]:
    """Where tensors are. The method of the class, not of each: a third of the time.

    Raises:
        RuntimeError: one of them has no storage.
    """
    import torch

    return list(map(torch.Tensor.data_ptr, tensors))


class Guard:
    """What was read of PEFT layers, by value, and of the parameters of one adapter, by identity."""

    def __init__(
        self,
        attributes: list[dict[str, Any]],
        found_in: Iterable[object],
        parameters: list[Tensor],
        addresses: list[int],
    ) -> None:
        """`attributes` of the layers, and the containers that the parameters were found in.

        Raises:
            KeyError: a layer says what its class says.
            TypeError: it says something else than names, switches and numbers.
        """
        self._attributes = attributes
        # By value, of what is in the layers then: a list or dictionary that was replaced by an equal one, as PEFT's
        # `rescale_adapter_scale` does, is read as the layer has it and needs no watching of its own.
        self._said = list(map(_copied, map(_KEPT, attributes)))
        self._contents = Contents(found_in)
        self._parameters = parameters
        self._addresses = addresses
        # Kept, so that nothing else comes to their addresses, of another dtype: a model that is moved and cast keeps
        # its parameters, and gets the addresses back that are free.
        self._storages = [parameter.detach() for parameter in parameters]

    def holds(self) -> bool:
        """Is everything where and what it was?"""
        return (
            list(map(_KEPT, self._attributes)) == self._said
            and self._contents.are_the_same()
            and addresses_of(self._parameters) == self._addresses
        )


def _copied(said: tuple[Any, ...]) -> tuple[Any, ...]:
    """What one layer says, in containers of its own.

    Raises:
        TypeError: not by plain values. Tensors compare element by element, and are written in place.
    """
    return tuple(
        [_plain(one) for one in thing]
        if type(thing) is list
        else {_plain(name): _plain(one) for name, one in thing.items()}
        if type(thing) is dict
        else _plain(thing)
        for thing in said
    )


def _plain(thing: Any) -> Any:
    if type(thing) not in (str, bool, int, float):
        raise TypeError(f"a {type(thing).__name__}")
    return thing
