"""Prompts: `max_prompt_length` of GRPO and RLOO, where TRL does not follow it any more.

Up to TRL 0.25 (RLOO 0.26) prompts were cut from the left to that many tokens. From 0.29.1 on TRL makes the ids of all
prompts in one method, and they are cut there; between, inside the call that generates.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from typing import Any

from trlpatch.log import tell_translation
from trlpatch.runtime.undo_journal import Assignment, UndoJournal

FIELD = "max_prompt_length"
_TRAINERS = ("GRPOTrainer", "RLOOTrainer")


def cut_prompts(journal: UndoJournal, cls: type) -> None:
    """Make a GRPO or RLOO trainer that does not read `args.max_prompt_length` follow it."""
    if cls.__name__ not in _TRAINERS or "__init__" not in vars(cls) or not cls.__module__.startswith("trl.trainer."):
        return
    if FIELD in inspect.unwrap(vars(cls)["__init__"]).__code__.co_names:
        return
    for name, wrapped in (("_tokenize_prompts", _tokenize_prompts), ("_generate_single_turn", _generate_single_turn)):
        if name in vars(cls):
            journal.make([Assignment(cls, name, wrapped(journal, vars(cls)[name]))])
            return


def _tokenize_prompts(journal: UndoJournal, original: Any) -> Any:
    @functools.wraps(original)
    def _tokenize_prompts(self: Any, prompts: list[Any]) -> Any:
        found = original(self, prompts)
        limit = getattr(self.args, FIELD, None)
        if limit is None or journal.undone:
            return found
        return _hooks().cut(*found, limit=limit)

    return _tokenize_prompts


def _generate_single_turn(journal: UndoJournal, original: Any) -> Any:
    @functools.wraps(original)
    def _generate_single_turn(self: Any, prompts: list[Any]) -> Any:
        limit = getattr(self.args, FIELD, None)
        if limit is None or journal.undone:
            return original(self, prompts)
        # The fields of GRPO 0.26 and 0.27 and of RLOO 0.27 and 0.28 are upstream's own, whose warning is another one.
        tell_translation(
            f"{type(self).__name__}: prompts are cut from the left to args.max_prompt_length={limit} tokens"
        )
        with _hooks().cutting(self, limit):
            return original(self, prompts)

    return _generate_single_turn


def _hooks() -> Any:
    return import_module("trlpatch.hooks.prompt_length")
