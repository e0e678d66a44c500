"""Dataclass swap: give a live config the members that `@dataclass` generates for other text, keeping the class.

A config class that was imported before patching is already the base of other configs, the type of live instances and
the value of names in user modules, so it cannot be replaced by a new class. What `@dataclass` generated for it can be.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from trlpatch.runtime.live_objects import is_upstream, subclasses
from trlpatch.runtime.undo_journal import ABSENT, Assignment

_GENERATED = ("__init__", "__repr__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__match_args__")
_FIELDS = "__dataclass_fields__"
_NOT_COPIED = {
    "__dict__",
    "__weakref__",
    "__dataclass_params__",
    "__annotate_func__",
    "__annotations_cache__",
    _FIELDS,
}


def field_assignments(live: type, scratch: type) -> list[Assignment]:
    """Return what turns `live` into the dataclass `scratch`, methods written in the class body excepted.

    Args:
        scratch: the same class, executed from other text in a namespace of its own.
    """
    before, after = _own_annotations(live), _own_annotations(scratch)
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    return [
        *generated_assignments(live, scratch),
        Assignment(live, "__annotations__", after),
        Assignment(live, "__doc__", scratch.__doc__),
        *(Assignment(live, name, vars(scratch)[name]) for name in added if name in vars(scratch)),
        *(Assignment(live, name, ABSENT) for name in removed),
    ]


def inheriting_assignments(scratches: Mapping[type, type]) -> Iterator[Assignment]:
    """Yield what gives TRL's own subclasses of changed configs the changed fields.

    Args:
        scratches: the changed live classes and the scratch class of each.
    """
    rebuilt = dict(scratches)
    for base in scratches:
        for cls in subclasses(base):
            if cls in rebuilt or not is_upstream(cls):
                continue
            rebuilt[cls] = rebuild_on(cls, tuple(rebuilt.get(parent, parent) for parent in cls.__bases__))
            if _is_dataclass_itself(cls):
                yield from generated_assignments(cls, rebuilt[cls])


def out_of_reach(cls: type, names: set[str]) -> list[str]:
    """Describe the dataclasses outside TRL, defined from `cls` before it had the fields `names`."""
    return [
        f"{found.__module__}.{found.__qualname__}(...) does not take {', '.join(sorted(names))}: it was defined "
        "before PatchFastRL; define it afterwards, or set the attribute on the built config"
        for found in subclasses(cls)
        if _is_dataclass_itself(found) and not is_upstream(found)
    ]


def new_fields(live: type, scratch: type) -> set[str]:
    """Return the names of the fields that `scratch` has and `live` lacks."""
    return set(vars(scratch)[_FIELDS]) - set(vars(live)[_FIELDS])


def is_exchangeable(cls: type) -> bool:
    """Tell whether `cls` is a dataclass whose generated members may be exchanged."""
    return _is_dataclass_itself(cls) and "__slots__" not in vars(cls)


def _is_dataclass_itself(cls: type) -> bool:
    return bool(_FIELDS in vars(cls))


def _own_annotations(cls: type) -> dict[str, Any]:
    return dict(inspect.get_annotations(cls))


def generated_assignments(live: type, scratch: type) -> Iterator[Assignment]:
    """Yield what gives `live` the members that `@dataclass` generated for `scratch`, and its fields."""
    for name in _GENERATED:
        if name in vars(scratch) and name in vars(live) and is_generated(vars(live)[name]):
            yield Assignment(live, name, vars(scratch)[name])
    yield Assignment(live, _FIELDS, vars(scratch)[_FIELDS])


def is_generated(member: Any) -> bool:
    """Tell whether `@dataclass` made a member of a class."""
    if isinstance(member, FunctionType):
        # dataclasses compiles what it generates under this file name; __repr__ is wrapped against recursion.
        generated: FunctionType = inspect.unwrap(member)
        return generated.__code__.co_filename == "<string>"
    return isinstance(member, tuple)  # __match_args__


def rebuild_on(cls: type, bases: tuple[type, ...]) -> type:
    """Return the dataclass that `cls` would be with these bases."""
    fields: dict[str, dataclasses.Field[Any]] = vars(cls).get(_FIELDS, {})
    own = _own_annotations(cls)
    namespace = {
        name: value
        for name, value in vars(cls).items()
        if name not in _NOT_COPIED and not (name in _GENERATED and is_generated(value))
    }
    for name in own:
        if name in fields and fields[name]._field_type.name != "_FIELD_CLASSVAR":  # type: ignore[attr-defined]
            namespace[name] = copy.copy(fields[name])
    namespace |= {"__annotations__": own, "__qualname__": cls.__qualname__}
    scratch = type(cls)(cls.__name__, bases, namespace)
    if not fields:
        return scratch
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    return dataclasses.dataclass(
        init=parameters.init, repr=parameters.repr, eq=parameters.eq, order=parameters.order, frozen=parameters.frozen
    )(scratch)
