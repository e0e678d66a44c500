"""Prompts and their arguments as `vllm.LLM` takes them, one of each per request."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

_UNSAID_TOKENS = 256
"""Taken for a completion's length where max_tokens is not said."""


def as_prompts(prompts: Any) -> list[Any]:
    """`LLM.generate`'s first argument as a list: one text, list of token ids or dictionary is one prompt."""
    if isinstance(prompts, (str, Mapping)) or (isinstance(prompts, Sequence) and prompts and _is_id(prompts[0])):
        prompts = [prompts]
    return [{"prompt_token_ids": list(one)} if _are_ids(one) else one for one in prompts]


def as_conversations(messages: Any) -> list[Any]:
    """`LLM.chat`'s first argument as a list of conversations."""
    found = list(messages)
    return [found] if found and isinstance(found[0], Mapping) else found


def one_each(value: Any, count: int, name: str) -> list[Any]:
    """One value a prompt, of one for all or of as many as there are prompts.

    Raises:
        ValueError: there is another number of them.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} for {count} prompts; expected one for all, or one for each")
    return list(value)


def kind_of(prompt: Any, place: int) -> Hashable:
    """Equal for equal prompts; where that is not looked into (images), equal to no other place's."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) and set(prompt) <= {"prompt_token_ids", "prompt"}:
        ids = prompt.get("prompt_token_ids")
        return tuple(ids) if ids is not None else str(prompt.get("prompt"))
    return None, place


def sequences_of(params: Any) -> int:
    """Completions of one prompt."""
    return max(1, int(getattr(params, "n", 1) or 1))


def cost_of(prompt: Any, params: Any) -> int:
    """Tokens of a prompt, estimated where it is text, and the most that may be sampled for it."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    length = len(ids) if ids is not None else len(str(prompt)) // 4
    return length + sequences_of(params) * int(getattr(params, "max_tokens", None) or _UNSAID_TOKENS)


def _is_id(value: Any) -> bool:
    return isinstance(value, int)


def _are_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and _is_id(value[0])
