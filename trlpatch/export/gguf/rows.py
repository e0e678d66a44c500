"""Quantize rows: llama.cpp's own code in xllamacpp's library, or libgguf's, or NumPy for the simple types.

The three give the same bytes for the types that they share (tests/export_gguf/test_rows.py). Each is handed float32
and returns bytes; none needs a compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trlpatch.errors import MissingPackage
from trlpatch.export.gguf.mix import BLOCKS
from trlpatch.versions import pip_install

Quantize = Callable[[str, Any], Any]
"""(ggml type, float32 array of rows) -> uint8 array (rows, bytes of a row)."""

GGML_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "BF16": 30,
}  # fmt: skip
"""`ggml_type` of ggml.h, part of the file format."""

SIMPLE = ("F32", "F16", "BF16", "Q8_0")
"""What convert_hf_to_gguf.py writes, with NumPy."""

_CHUNK = 1 << 18
"""Weights that a thread quantizes at once."""


def row_quantizer(kinds: set[str]) -> Quantize:
    """Return a function that quantizes rows to any of these types.

    Raises:
        MissingPackage: a type needs llama.cpp's row quantizers, and neither xllamacpp nor libgguf is installed.
    """
    mixed = sorted(kinds - set(SIMPLE))
    if not mixed:
        return simple
    library = xllamacpp_library()
    other = _of_library(library) if library is not None else _of_libgguf()
    if other is None:
        raise MissingPackage(
            f"quantizing to {', '.join(mixed)}: expected llama.cpp's row quantizers, found neither xllamacpp nor "
            f"libgguf; {pip_install('gguf')}"
        )
    quantize = _in_threads(other)
    return lambda kind, rows: simple(kind, rows) if kind in SIMPLE else quantize(kind, rows)


def simple(kind: str, rows: Any) -> Any:
    """Convert with gguf's NumPy code, as the converter does. Returns the same bytes as an uint8 array."""
    import gguf
    import numpy as np

    if kind == "F32":
        return np.ascontiguousarray(rows, dtype=np.float32).view(np.uint8)
    converted = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(converted).view(np.uint8)


def xllamacpp_library() -> Path | None:
    """Return xllamacpp's shared object, which exports the C API of the llama.cpp in it; imports nothing."""
    return shared_object("xllamacpp", "xllamacpp*.so")


def shared_object(package: str, pattern: str) -> Path | None:
    """Return the first file of an installed package that matches, without importing the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = [Path(one) for one in (spec.submodule_search_locations or ())] if spec is not None else []
    return next((path for folder in folders for path in sorted(folder.glob(pattern))), None)


def _of_library(path: Path) -> Quantize:
    import numpy as np

    library = ctypes.CDLL(str(path))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]

    def quantize(kind: str, rows: Any) -> Any:
        count, length = rows.shape
        weights, size = BLOCKS[kind]
        out = np.empty((count, length // weights * size), dtype=np.uint8)
        number = GGML_TYPES[kind]
        library.ggml_quantize_init(number)
        written = chunk(number, rows.ctypes.data, out.ctypes.data, 0, count, length, None)
        assert written == out.nbytes, (kind, written, out.nbytes)
        return out

    return quantize


def _of_libgguf() -> Quantize | None:
    if importlib.util.find_spec("libgguf") is None:
        return None
    import libgguf
    import numpy as np

    def quantize(kind: str, rows: Any) -> Any:
        packed = libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[kind])
        return np.asarray(packed).view(np.uint8).reshape(len(rows), -1)

    return quantize


def _in_threads(quantize: Quantize) -> Quantize:
    """Spread blocks of rows over the cores that this process may use: both libraries release the interpreter lock."""
    import numpy as np

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def all_rows(kind: str, rows: Any) -> Any:
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        step = max(1, _CHUNK // rows.shape[1])
        blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
        if len(blocks) == 1:
            return quantize(kind, rows)
        return np.concatenate(list(pool.map(lambda block: quantize(kind, block), blocks)))

    return all_rows
