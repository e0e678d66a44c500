"""Prompts as token ids, and completions as reward functions get them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Renderer:
    """A tokenizer of the worker's own: fast tokenizers cannot be used by two threads at once."""

    def __init__(self, processing_class: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
        """Copy the tokenizer of a trainer."""
        self.tokenizer = copy.deepcopy(getattr(processing_class, "tokenizer", processing_class))
        self._kwargs = dict(chat_template_kwargs)
        self._parse = _parser(self.tokenizer)

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Token ids of a conversation, with the opening of the assistant's turn, or of a text."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False, **self._kwargs
            )
        )

    def content(self, prompt: Any, token_ids: Sequence[int]) -> Any:
        """A completion in the form of its prompt: a list of one message, or a text."""
        if not isinstance(prompt, str) and self._parse is not None:
            return [self._parse(list(token_ids))]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _parser(tokenizer: Any) -> Callable[[list[int]], Any] | None:
    """TRL's own parser, for the chat templates whose answers it can take apart (reasoning, tool calls)."""
    try:
        from trl.chat_template_utils import add_response_schema, parse_response
    except ImportError:
        return None
    described = any(getattr(tokenizer, name, None) is not None for name in ("response_schema", "response_template"))
    if not described:
        with contextlib.suppress(ValueError):  # TRL does not know this template
            add_response_schema(tokenizer)
            described = True
    return (lambda token_ids: parse_response(tokenizer, token_ids)) if described else None
