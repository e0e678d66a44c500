"""Write what stands beside the weights: config, generation config, tokenizer and chat template."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def has_tokenizer(directory: Path) -> bool:
    """Is a tokenizer saved there?"""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def sanitised_config(config: Any) -> Any:
    """A copy of a model's config for 16-bit weights: it says no more that they are quantized."""
    found = copy.deepcopy(config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        found.__dict__.pop(name, None)
    return found


def untie(config: Any) -> None:
    """Say that input and output embeddings are saved apart."""
    for one in {id(part): part for part in (config, config.get_text_config())}.values():
        one.tie_word_embeddings = False


def sanitised_generation_config(config: Any) -> Any:
    """A copy that `save_pretrained` accepts: sampling values without do_sample=True raise ValueError there."""
    if config is None:
        return None
    found = copy.deepcopy(config)
    if _saves(found):
        return found
    found.do_sample = True
    if _saves(found):
        return found
    from transformers import GenerationConfig

    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name, None) for name in kept})


def _saves(config: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            config.validate(strict=True)
        except (ValueError, UserWarning):
            return False
        except TypeError:  # releases without `strict` warn
            try:
                config.validate()
            except (ValueError, UserWarning):
                return False
    return True


def save_settings(
    directory: Path,
    config: Any,
    generation_config: Any,
    tokenizer: Any,
    *,
    processor: Sequence[Path] = (),
    dtype: torch.dtype | None,
) -> list[str]:
    """Write the files; their names."""
    before = set(directory.iterdir())
    config.save_pretrained(directory)
    if dtype is not None:
        _set_dtype(directory / "config.json", str(dtype).removeprefix("torch."))
    if generation_config is not None:
        generation_config.save_pretrained(directory)
    save_processing(directory, tokenizer, processor)
    return sorted(path.name for path in set(directory.iterdir()) - before)


def save_processing(directory: Path, tokenizer: Any, processor: Sequence[Path]) -> None:
    """Write the tokenizer, or the processor that `tokenizer` is, or both where a processor is given by its files."""
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    for path in processor:
        shutil.copyfile(path, directory / path.name)


def _set_dtype(path: Path, dtype: str) -> None:
    """transformers 4.56 renamed torch_dtype to dtype; later releases and vLLM read either."""
    found = json.loads(path.read_text(encoding="utf-8"))
    name = "torch_dtype" if "torch_dtype" in found else "dtype"
    found[name] = dtype
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
