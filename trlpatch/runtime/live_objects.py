"""Live objects of this process: trainers built, subclasses defined, functions behind decorators."""

from __future__ import annotations

import functools
import gc
from collections.abc import Collection, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

_UNWRAPPED_BY = ("__wrapped__", "__func__", "fget", "fset", "fdel", "func")
_WRAPPERS = (
    FunctionType,
    MethodType,
    staticmethod,
    classmethod,
    property,
    functools.partial,
    functools.partialmethod,
    functools.cached_property,
)


def instances(classes: Collection[type]) -> dict[str, int]:
    """Count the live instances of `classes` and their subclasses, by class name; what is garbage does not count."""
    counts = _referring_instances(classes)
    if counts:
        # A trainer is full of cycles, so a deleted one may lie here uncollected. A full collection takes a second once
        # torch and transformers are imported, and nearly no process has built a trainer before it patches.
        gc.collect()
        counts = _referring_instances(classes)
    return counts


def _referring_instances(classes: Collection[type]) -> dict[str, int]:
    # An instance of a class refers to it (CPython 3.9 and newer), so the collector finds them in one pass in C.
    wanted = {found for cls in classes for found in (cls, *subclasses(cls))}
    counts: dict[str, int] = {}
    for candidate in gc.get_referrers(*wanted) if wanted else ():
        # type(), not isinstance(): a proxy's __class__ may run arbitrary code.
        kind = type(candidate)
        if kind in wanted:
            counts[kind.__qualname__] = counts.get(kind.__qualname__, 0) + 1
    return counts


def subclasses(cls: type) -> Iterator[type]:
    """Yield every live subclass of `cls`, each once, parents first."""
    seen: set[type] = set()
    waiting: list[type] = list(type.__subclasses__(cls))
    while waiting:
        found = waiting.pop(0)
        if found not in seen:
            seen.add(found)
            yield found
            waiting += type.__subclasses__(found)


def is_upstream(cls: type) -> bool:
    """Tell whether a class is TRL's own."""
    return cls.__module__ == "trl" or cls.__module__.startswith("trl.")


def functions(attribute: Any) -> Iterator[FunctionType]:
    """Yield the functions that a class or module attribute is made of, through every decorator.

    Follows `__wrapped__`, descriptors, partials and closures: a decorator that forgets `functools.wraps` still holds
    the function in a cell.
    """
    seen: set[int] = set()
    waiting: list[Any] = [attribute]
    while waiting:
        found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, FunctionType):
            yield found
            waiting += [content for content in _cells(found) if _may_wrap(content)]
        if _may_wrap(found):
            waiting += [inner for name in _UNWRAPPED_BY if (inner := getattr(found, name, None)) is not None]


def _may_wrap(value: Any) -> bool:
    return isinstance(value, _WRAPPERS) or (callable(value) and "__wrapped__" in getattr(value, "__dict__", {}))


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the cell of a name that was never bound
            continue


def overriding(base: type, methods: Iterable[str]) -> list[str]:
    """Describe the subclasses outside TRL whose own text replaces a method of `base` without calling it."""
    touched = sorted(set(methods))
    return [
        f"{cls.__module__}.{cls.__qualname__}.{name} replaces {base.__name__}.{name} without calling it; the patches "
        "in that method do not run there"
        for cls in subclasses(base)
        if not is_upstream(cls)
        for name in touched
        if name in vars(cls) and not any(_calls_base(f.__code__, base.__name__) for f in functions(vars(cls)[name]))
    ]


def _calls_base(code: CodeType, base: str) -> bool:
    names = {*code.co_names, *code.co_freevars}
    if names & {"super", base}:
        return True
    return any(_calls_base(inner, base) for inner in code.co_consts if isinstance(inner, CodeType))
