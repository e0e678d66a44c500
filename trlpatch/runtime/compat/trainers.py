"""Trainers: `tokenizer=`, and the arguments of `SFTTrainer` that are fields of its config now."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from typing import Any

from trlpatch.runtime.compat.removed import TOKENIZER, Removed, known
from trlpatch.runtime.compat.said import say
from trlpatch.runtime.undo_journal import Assignment, UndoJournal


def wrap_init(journal: UndoJournal, cls: type, original: Any) -> None:
    """Make `cls(tokenizer=...)` mean `processing_class=`."""
    signature = inspect.signature(original)
    if "processing_class" not in signature.parameters or "tokenizer" in vars(cls):
        return  # its own way of passing arguments on; or the Trainer of transformers 4, which still takes it
    table = {name: one for name, one in known(cls).items() if name not in signature.parameters}

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (journal.undone or table.keys().isdisjoint(kwargs)):
            args, kwargs = _translated(cls, signature, table, args, kwargs)
        original(self, *args, **kwargs)

    journal.make([Assignment(cls, "__init__", init)])


def _translated(
    cls: type, signature: inspect.Signature, table: dict[str, Removed], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments in today's words.

    Raises:
        TypeError: both spellings are given, or a config is needed for one and there is none.
    """
    kwargs = dict(kwargs)
    old = {name: kwargs.pop(name) for name in table if name in kwargs}
    bound = signature.bind_partial(None, *args, **kwargs)
    given = bound.arguments
    if TOKENIZER.name in old:
        words = old.pop(TOKENIZER.name)
        if given.get("processing_class") is not None and given["processing_class"] is not words:
            raise TypeError(f"{cls.__name__}: both tokenizer= and processing_class= are given; pass processing_class")
        given["processing_class"] = words
        say(cls.__name__, TOKENIZER, "processing_class is set")
    if old:
        given["args"] = _with_fields(cls, given.get("args"), {table[name].to: value for name, value in old.items()})
        for name in old:
            say(cls.__name__, table[name], f"args.{table[name].to} is set")
    return bound.args[1:], bound.kwargs


def _with_fields(cls: type, args: Any, values: dict[str, Any]) -> Any:
    """Return the trainer's config with other values of some fields.

    Raises:
        TypeError: there is no config, or TRL does not have such a field.
    """
    config = getattr(sys.modules["trl.trainer.sft_config"], "SFTConfig", None)
    if args is None or config is None:
        raise TypeError(
            f"{cls.__name__}({', '.join(f'{name}=' for name in values)}) without args: these are fields of the config "
            "now; pass args=SFTConfig(output_dir=..., ...) with them"
        )
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    if values.keys() - fields:
        raise TypeError(f"SFTConfig has no field {', '.join(sorted(values.keys() - fields))} in this TRL")
    if isinstance(args, config):
        return _copied(args, values)
    # SFTTrainer does this to plain TrainingArguments.
    known = {name: value for name, value in args.to_dict().items() if name in fields}
    return config(**{**known, "hub_token": args.hub_token, **values})


def _copied(args: Any, values: dict[str, Any]) -> Any:
    made = object.__new__(type(args))
    vars(made).update(vars(args))
    for name, value in values.items():
        setattr(made, name, value)
    return made
