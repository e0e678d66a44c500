"""llama.cpp's converter for the tests that run it, fetched once a machine, and the models that they export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden.sources import wheel_cache

TEXTS = ["the quick brown fox jumps over the lazy dog", "0 1 2 3 4 5 6 7 8 9"] * 8
SHAPE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
"""Rows are multiples of 256, the block of K-quants."""


@pytest.fixture(scope="session")
def converter_cache() -> Path:
    """A cache folder that outlives the tests, beside the wheels of TRL."""
    return wheel_cache() / "gguf"


@pytest.fixture
def converter(converter_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama.cpp's converter: 77 MB the first time on a machine."""
    from trlpatch.export.gguf.converter_files import converter_files

    monkeypatch.setenv("TRLPATCH_CACHE_DIR", str(converter_cache))
    return converter_files()


@pytest.fixture
def on_one_stack() -> None:
    """For exports about what the stack has no part in: bytes of a file, llama.cpp, pipes, words that are printed."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("no stack changes what this is about, and each export takes seconds: with transformers 5")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with tied embeddings, in bfloat16, with a tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen"
    torch.manual_seed(0)
    save(Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).to(torch.bfloat16), folder)
    return folder


def save(model: Any, folder: Path) -> None:
    """Save a model whose logits depend on all of it, and a tokenizer."""
    import torch

    from tests.words import byte_tokenizer

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    byte_tokenizer(TEXTS, vocabulary=SHAPE["vocab_size"]).save_pretrained(folder)


@pytest.fixture
def dequantized(converter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The vendored gguf package, importable."""
    import importlib
    import sys

    before = {name for name in sys.modules if name.split(".")[0] == "gguf"}
    monkeypatch.syspath_prepend(str(converter / "gguf-py"))
    yield importlib.import_module("gguf")
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf" and name not in before]:
        del sys.modules[name]
