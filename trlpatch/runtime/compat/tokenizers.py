"""Tokenizers: `apply_chat_template(tokenize=True)` returns ids, as before transformers 5 (#41626, #42567)."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from trlpatch.runtime.compat.removed import Removed
from trlpatch.runtime.compat.said import say
from trlpatch.runtime.undo_journal import Assignment, UndoJournal

_BATCH_ENCODING = Removed(
    "tokenize",
    ("PreTrainedTokenizerBase",),
    "transformers 5 (#42567), which returns a BatchEncoding",
    'return_dict=False for ids, or take ["input_ids"]',
)
# They are written for the transformers that they are installed with.
_LIBRARIES = frozenset({"accelerate", "datasets", "peft", "sentence_transformers", "transformers", "trl", "vllm"})


def return_ids(journal: UndoJournal, cls: type) -> None:
    """Make `return_dict` False for callers that do not say it and are no library."""
    original = vars(cls)["apply_chat_template"]
    signature = inspect.signature(original)
    default = signature.parameters.get("return_dict")
    if default is None or default.default is not True:
        return  # transformers 4, and processors, which return no dict

    @functools.wraps(original)
    def apply_chat_template(self: Any, *args: Any, **kwargs: Any) -> Any:
        if journal.undone:
            return original(self, *args, **kwargs)
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        if caller in _LIBRARIES or kwargs.get("return_assistant_tokens_mask"):
            return original(self, *args, **kwargs)
        given = signature.bind_partial(self, *args, **kwargs).arguments
        if "return_dict" in given or not given.get("tokenize", True):
            return original(self, *args, **kwargs)
        say(f"{cls.__name__}.apply_chat_template", _BATCH_ENCODING, "a list of ids is returned")
        return original(self, *args, **kwargs, return_dict=False)

    journal.make([Assignment(cls, "apply_chat_template", apply_chat_template)])
