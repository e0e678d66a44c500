"""Changed classes: what is done to the classes of a module of TRL or transformers once it has been executed."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

from trlpatch.log import forget_translations
from trlpatch.runtime.compat import configs, prompts, tokenizers, trainers
from trlpatch.runtime.live_objects import subclasses
from trlpatch.runtime.undo_journal import UndoJournal

_journal = UndoJournal(keep_foreign=True)
_originals: dict[type, Any] = {}
"""The `__init__` of the classes that were changed."""


def change(module: str) -> None:
    """Have the classes that `module` defines, and those made from them already, take the arguments that are gone."""
    namespace = sys.modules.get(module)
    if not isinstance(namespace, ModuleType):
        return
    arguments, trainer = _base("training_args", "TrainingArguments"), _base("trainer", "Trainer")
    for cls in [value for value in list(vars(namespace).values()) if isinstance(value, type)]:
        if cls.__module__ != module:
            continue
        if arguments is not None and issubclass(cls, arguments):
            _config(cls)
        elif trainer is not None and issubclass(cls, trainer):
            _trainer(cls)
        elif "apply_chat_template" in vars(cls) and module.startswith("transformers."):
            tokenizers.return_ids(_journal, cls)


def undo() -> None:
    """Return every class to what it was; what others have wrapped since stays, with ours under it doing nothing."""
    global _journal
    _journal.undo()
    _journal.undone = True
    _journal = UndoJournal(keep_foreign=True)
    _originals.clear()
    base = _base("training_args", "TrainingArguments")
    if base is not None:
        configs.drop_fields(subclasses(base))
    forget_translations()


def _base(module: str, name: str) -> type | None:
    # Classes of a module that another thread is executing are changed when it is done.
    found: Any = getattr(sys.modules.get(f"transformers.{module}"), name, None)
    return found if isinstance(found, type) else None


def _config(cls: type) -> None:
    made_from_it = [cls, *subclasses(cls)]
    added = configs.add_fields(_journal, cls, made_from_it)
    for one in made_from_it:
        if _has_init(one) and (added or one not in _originals):
            configs.wrap_init(_journal, one, _originals.setdefault(one, vars(one)["__init__"]))


def _trainer(cls: type) -> None:
    for one in (cls, *subclasses(cls)):
        if _has_init(one) and one not in _originals:
            _originals[one] = vars(one)["__init__"]
            prompts.cut_prompts(_journal, one)
            trainers.wrap_init(_journal, one, _originals[one])


def _has_init(cls: type) -> bool:
    # Others, such as a partialmethod or compiled code, cannot be read or called.
    return isinstance(vars(cls).get("__init__"), FunctionType)
