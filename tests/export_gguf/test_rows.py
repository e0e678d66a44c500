"""Row quantizers give the same bytes, whoever makes them."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from trlpatch.errors import MissingPackage
from trlpatch.export.gguf import rows
from trlpatch.export.gguf.mix import BLOCKS
from trlpatch.export.gguf.rows import SIMPLE, row_quantizer
from trlpatch.versions import pip_install

pytestmark = pytest.mark.torch

MIXED = sorted(BLOCKS.keys() - set(SIMPLE))


@pytest.fixture
def weights() -> Any:
    import numpy as np

    return np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", MIXED)
def test_xllamacpp_and_libgguf_agree(kind: str, weights: Any) -> None:
    library = rows.xllamacpp_library()
    assert library is not None
    of_library, of_libgguf = rows._of_library(library), rows._of_libgguf()
    assert of_libgguf is not None
    packed = of_library(kind, weights)
    assert packed.shape == (64, 512 // BLOCKS[kind][0] * BLOCKS[kind][1])
    assert packed.tobytes() == of_libgguf(kind, weights).tobytes()


def test_blocks_in_threads_are_the_rows_in_order(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = row_quantizer({"Q4_K"})("Q4_K", weights)
    monkeypatch.setattr(rows, "_CHUNK", 512 * 5)
    assert row_quantizer({"Q4_K"})("Q4_K", weights).tobytes() == whole.tobytes()


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_numpy_gives_what_llama_cpp_gives(kind: str, weights: Any, dequantized: Any) -> None:
    library = rows.xllamacpp_library()
    assert library is not None
    if kind == "F16":
        assert rows.simple(kind, weights).tobytes() == weights.astype("float16").tobytes()
        return
    assert rows.simple(kind, weights).tobytes() == rows._of_library(library)(kind, weights).tobytes()


def test_without_either_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "xllamacpp_library", lambda: None)
    monkeypatch.setitem(sys.modules, "libgguf", None)
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=rf"Q4_K, Q6_K: .*{re.escape(pip_install('gguf'))}"):
        row_quantizer({"Q4_K", "Q6_K", "F32"})
    assert row_quantizer({"F32"})("F32", __import__("numpy").ones((1, 2), "float32")).nbytes == 8
