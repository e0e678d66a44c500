"""tokenizer.model, of which llama.cpp's converter makes some vocabularies (Gemma, Phi-3).

transformers 5 neither reads nor saves it where there is a tokenizer.json, so it is copied from where the tokenizer is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "tokenizer.model"


def copy_sentencepiece(tokenizer: Any, base: Path | None, folder: Path) -> None:
    """Copy tokenizer.model into a folder that has none, from beside the tokenizer or the base."""
    if (folder / NAME).is_file():
        return
    found = next((path for path in _places(tokenizer, base) if path.is_file()), None)
    if found is not None:
        shutil.copyfile(found, folder / NAME)


def _places(tokenizer: Any, base: Path | None) -> Iterator[Path]:
    vocabulary = getattr(tokenizer, "vocab_file", None)
    if isinstance(vocabulary, str) and vocabulary.endswith(".model"):
        yield Path(vocabulary)
    name = getattr(tokenizer, "name_or_path", "") or ""
    if name:
        yield Path(name) / NAME
        yield from _cached(name)
    if base is not None:
        yield base / NAME


def _cached(name: str) -> Iterator[Path]:
    """Yield it from the hub's cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, NAME)
    except HFValidationError:  # a path
        return
    if isinstance(found, str):
        yield Path(found)
