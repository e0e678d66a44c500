"""Prompt length hooks, `max_prompt_length` of releases that have no more of it than the name, with compat="on"."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from trlpatch.errors import PromptTooLong
from trlpatch.hooks.repairs import prompt_limit, sampling_limit
from trlpatch.hooks.trainers import engine_of
from trlpatch.log import warn_once
from trlpatch.options import active

T = TypeVar("T")

_limit: ContextVar[int | None] = ContextVar("max_prompt_length", default=None)


def cut(
    prompt_ids: list[list[int]], images: Any, multimodal_fields: Mapping[str, Any], *, limit: int
) -> tuple[list[list[int]], Any, dict[str, Any]]:
    """Cut prompts from the left to `limit` tokens, and what a processor says of each of their tokens alike.

    Raises:
        PromptTooLong: a prompt with images is longer; its image tokens must stay as many as the images are large.
    """
    lengths = [len(ids) for ids in prompt_ids]
    if max(lengths, default=0) <= limit:
        return prompt_ids, images, dict(multimodal_fields)
    if images is not None or "pixel_values" in multimodal_fields:
        raise PromptTooLong(
            f"max_prompt_length={limit}: a prompt with images has {max(lengths)} tokens, and cutting it would cut its "
            "image tokens. Leave such examples out (dataset.filter), or set max_prompt_length=None"
        )
    fields = {
        name: [row[-limit:] for row in value] if _is_per_token(value, lengths) else value
        for name, value in multimodal_fields.items()
    }
    return [ids[-limit:] for ids in prompt_ids], images, fields


def _is_per_token(value: Any, lengths: list[int]) -> bool:
    return isinstance(value, list) and [len(row) for row in value if isinstance(row, list)] == lengths


@contextmanager
def cutting(trainer: Any, limit: int) -> Iterator[None]:
    """Cut the prompts of the rollouts inside: TRL 0.26 to 0.29.0, where vLLM or the processor makes the ids."""
    if getattr(trainer, "use_vllm", False) and getattr(trainer, "vllm_mode", "colocate") == "server":
        warn_once(trainer, f"max_prompt_length={limit} has no effect on a vLLM server: this TRL does not send it")
    words, token = trainer.processing_class, _limit.set(limit)
    trainer.processing_class = _Cutting(words, limit)
    try:
        with _limited(engine_of(trainer), limit):
            yield
    finally:
        trainer.processing_class = words
        _limit.reset(token)


@contextmanager
def _limited(engine: Any, limit: int) -> Iterator[None]:
    arguments = {} if engine is None else prompt_limit(engine, limit)
    if not arguments:
        yield
        return
    before = {name: vars(engine).get(name) for name in ("generate", "chat")}
    for name in before:
        setattr(engine, name, functools.partial(getattr(engine, name), **arguments))
    try:
        yield
    finally:
        for name, own in before.items():
            vars(engine).pop(name)
            if own is not None:
                setattr(engine, name, own)


def with_limit(build: Callable[..., T]) -> Callable[..., T]:
    """Return `build`, vLLM's SamplingParams, with the limit of the rollout that is being made."""
    limit = _limit.get()
    return build if limit is None else functools.partial(build, **sampling_limit(limit))


def bound_model_length(args: Any) -> None:
    """Set `vllm_max_model_length` to prompt plus completion, as TRL did for its engine while it had both."""
    if active().compat != "on" or getattr(args, "vllm_max_model_length", 0) is not None:
        return
    prompt, completion = getattr(args, "max_prompt_length", None), getattr(args, "max_completion_length", None)
    if prompt is not None and completion is not None:
        args.vllm_max_model_length = prompt + completion


class _Cutting:
    """A tokenizer or processor whose calls cut prompts from the left; else the one it stands for."""

    def __init__(self, words: Any, limit: int) -> None:
        self._words, self._options = words, {"max_length": limit, "truncation": True}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._words, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _left(self._words):
            return self._words(*args, **{**self._options, **kwargs})

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's."""
        if not kwargs.get("tokenize", True):
            return self._words.apply_chat_template(*args, **kwargs)
        with _left(self._words):
            return self._words.apply_chat_template(*args, **{**self._options, **kwargs})


@contextmanager
def _left(words: Any) -> Iterator[None]:
    words = getattr(words, "tokenizer", words)
    before, words.truncation_side = words.truncation_side, "left"
    try:
        yield
    finally:
        words.truncation_side = before
