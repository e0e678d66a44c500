"""Arguments that are gone, where they are not accepted: a note on upstream's TypeError that says what to write.

No `__init__` is touched for it. A wrapper would be a frame that `warnings.warn(stacklevel=)` of TRL counts, and would
take what others wrap around `__init__` away with it when it goes. `__new__` of the two base classes gets the arguments
of every config and trainer, those defined later included, and has returned when `__init__` runs.
"""

from __future__ import annotations

import inspect
import sys
from types import FunctionType
from typing import Any

_BASES = {"transformers.training_args": "TrainingArguments", "transformers.trainer": "Trainer"}

_explaining = False


def change(module: str) -> None:
    """Explain the calls of the base class in `module` from now on, and of all classes made from it."""
    global _explaining
    _explaining = True
    base = getattr(sys.modules.get(module), _BASES[module], None)
    if isinstance(base, type) and "__new__" not in vars(base):
        setattr(base, "__new__", _New(base))  # noqa: B010 - mypy: a method


def undo() -> None:
    """Explain no more.

    What stays of `__new__` makes objects as `object.__new__` does: CPython cannot delete one again. Afterwards
    `object.__new__` would refuse every argument that `__init__` takes.
    """
    global _explaining
    _explaining = False


class _New:
    """The `__new__` of `base`."""

    def __init__(self, base: type) -> None:
        self._base = base

    @property
    def __signature__(self) -> inspect.Signature:
        """What `inspect.signature(base)` shows."""
        return inspect.signature(vars(self._base)["__init__"])

    def __call__(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        if _explaining and kwargs:
            _explain(cls, args, kwargs)
        make: Any = super(self._base, cls).__new__  # type: ignore[arg-type]
        return make(cls) if make is object.__new__ else make(cls, *args, **kwargs)


def _explain(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what calling `cls.__init__` raises where it does not take one of the names, with a note."""
    init = vars(cls).get("__init__", getattr(cls, "__init__", None))
    if not isinstance(init, FunctionType) or init.__code__.co_flags & inspect.CO_VARKEYWORDS:
        return  # what becomes of other names is decided inside
    from trlpatch.runtime.compat.removed import known
    from trlpatch.runtime.compat.said import explain

    code = init.__code__
    taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    gone = known(cls)
    met = [gone[name] for name in kwargs if name in gone and name not in taken]
    if met:
        try:
            init(None, *args, **kwargs)  # raises before anything of it runs
        except TypeError as error:
            explain(error, cls.__name__, met, accepted=False)
            raise
