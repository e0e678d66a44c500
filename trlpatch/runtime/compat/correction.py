"""Importance sampling correction: configs remember that nobody said whether they want it.

TRL's default is True, and Unsloth's configs have False. With settings that cut what tokens are drawn from it shrinks
gradients to nothing (`trlpatch.hooks.sampling_checks`, which then sets it to False where it was left out). True that a
user wrote and True by default are one value, so it is noted here, when a config is built.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from trlpatch.runtime.configs import is_generated
from trlpatch.runtime.live_objects import is_upstream
from trlpatch.runtime.undo_journal import Assignment, UndoJournal
from trlpatch.trl_names import CORRECTION, CORRECTION_LEFT_OUT


def remember(
    journal: UndoJournal, cls: type, signature: inspect.Signature, original: Any
) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """Return what tells of the arguments of an `__init__` of `cls` whether the field is left to upstream's default.

    `dataclasses.replace` and command lines give every field, so there it counts as said. So does a default that
    a class outside TRL has written. An `__init__` that somebody wrote calls a generated one, which knows what it got.
    """
    owner = next((one for one in cls.__mro__ if CORRECTION in vars(one).get("__annotations__", ())), None)
    if owner is None or not is_upstream(owner) or not is_generated(original) or CORRECTION not in signature.parameters:
        return lambda args, kwargs: False
    if cls is owner and "__setattr__" not in vars(cls):
        journal.make([Assignment(cls, "__setattr__", _noticing(cls.__setattr__))])
    place = list(signature.parameters).index(CORRECTION)  # `self` is the first
    return lambda args, kwargs: CORRECTION not in kwargs and len(args) < place


def mark(config: Any) -> None:
    """Note that the field is left out of the arguments that `config` is being built with."""
    vars(config)[CORRECTION_LEFT_OUT] = True


def _noticing(inherited: Any) -> Callable[[Any, str, Any], None]:
    @functools.wraps(inherited)
    def set_attribute(self: Any, name: str, value: Any) -> None:
        # The first time it is the generated `__init__` that sets it.
        if name == CORRECTION and name in vars(self):
            vars(self).pop(CORRECTION_LEFT_OUT, None)
        inherited(self, name, value)

    return set_attribute
