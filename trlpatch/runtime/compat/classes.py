"""Changed classes: what is done to the classes of a module of TRL or transformers once it has been executed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from trlpatch.runtime.compat import configs, prompts, said, tokenizers, trainers
from trlpatch.runtime.live_objects import subclasses
from trlpatch.runtime.undo_journal import UndoJournal

_journal = UndoJournal()
_originals: dict[type, Any] = {}
"""The `__init__` of the classes that were changed."""


def change(module: str, accept: bool) -> None:
    """Change the classes that `module` defines, and those that others have made from them already.

    Args:
        accept: take the arguments that are gone; else explain the error of upstream.
    """
    namespace = sys.modules.get(module)
    if not isinstance(namespace, ModuleType):
        return
    arguments, trainer = _base("training_args", "TrainingArguments"), _base("trainer", "Trainer")
    for cls in [value for value in vars(namespace).values() if isinstance(value, type)]:
        if cls.__module__ != module:
            continue
        if arguments is not None and issubclass(cls, arguments):
            _config(cls, accept)
        elif trainer is not None and issubclass(cls, trainer):
            _trainer(cls, accept)
        elif accept and "apply_chat_template" in vars(cls) and module.startswith("transformers."):
            tokenizers.return_ids(_journal, cls)


def undo() -> None:
    """Return every class to what it was."""
    _journal.undo()
    _originals.clear()
    base = _base("training_args", "TrainingArguments")
    if base is not None:
        configs.drop_fields(subclasses(base))
    said.forget()


def _base(module: str, name: str) -> type | None:
    # Classes of a module that another thread is executing are changed when it is done.
    found: Any = getattr(sys.modules.get(f"transformers.{module}"), name, None)
    return found if isinstance(found, type) else None


def _config(cls: type, accept: bool) -> None:
    made_from_it = [cls, *subclasses(cls)]
    added = accept and configs.add_fields(_journal, cls, made_from_it)
    for one in made_from_it:
        if "__init__" in vars(one) and (added or one not in _originals):
            configs.wrap_init(_journal, one, _originals.setdefault(one, vars(one)["__init__"]), accept)


def _trainer(cls: type, accept: bool) -> None:
    for one in (cls, *subclasses(cls)):
        if "__init__" in vars(one) and one not in _originals:
            _originals[one] = vars(one)["__init__"]
            if accept:
                prompts.cut_prompts(_journal, one)
            trainers.wrap_init(_journal, one, accept)
