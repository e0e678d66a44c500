"""The tokenizer of trainer and engine."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from trlpatch.engine.private_files import private_directory
from trlpatch.loading.checkpoint import hub_has
from trlpatch.loading.load_config import LoadConfig

_CONFIG = "config.json"


def load_tokenizer(config: LoadConfig) -> Any:
    """The tokenizer as TRL's trainers want it: padding on the left, and a token to pad with."""
    from transformers import AutoTokenizer

    arguments = dict(config.of_tokenizer)
    if config.tokenizer_name is not None:  # revision and subfolder are the model's
        arguments = {**arguments, "revision": None}
        arguments.pop("subfolder", None)
    if arguments["revision"] is None:
        del arguments["revision"]
    return prepared(AutoTokenizer.from_pretrained(config.tokenizer_name or config.model_name, **arguments))


def prepared(tokenizer: Any) -> Any:
    """The same tokenizer with padding on the left, and a token to pad with."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def engine_tokenizer(config: LoadConfig, hf_config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the engine argument for a `tokenizer_name` that is a place without a model: a directory that has one.

    vLLM reads config.json beside a tokenizer to know which class of tokenizer the model needs. Beside one without it,
    as in the directory of an adapter, it logs two errors, waits two seconds and goes on without knowing (0.23 to
    0.28). The directory is private to `tokenizer` and goes with it: `keep` ties it to the engine.

    Nothing is returned where transformers 5, which goes by the model's type too, would make another tokenizer of it
    than the trainer's: one saved as PreTrainedTokenizerFast.
    """
    name = config.tokenizer_name
    if name is None or "tokenizer" in config.engine or _has_model(config, name):
        return {}
    from transformers import AutoTokenizer

    directory, remove = private_directory(tokenizer)
    hf_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    again = AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    if _content(again) != _content(tokenizer):
        remove()
        return {}
    return {"tokenizer": str(directory)}


def _content(tokenizer: Any) -> tuple[Any, ...]:
    """What makes ids of a text, and a text of messages."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if core is None else core.to_str()
    return (rules, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id)


def keep(tokenizer: Any, engine: Any) -> None:
    """Let `tokenizer` live as long as `engine`, which may read its directory again."""
    weakref.finalize(engine, id, tokenizer)


def _has_model(config: LoadConfig, name: str) -> bool:
    place = Path(name)
    if place.is_dir():
        return (place / _CONFIG).is_file()
    cache = {"cache_dir": config.model["cache_dir"]} if "cache_dir" in config.model else {}
    return hub_has(name, _CONFIG, token=config.token, **cache)
