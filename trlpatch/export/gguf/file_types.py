"""The types of GGUF files: their names, Unsloth's words for them, and what of llama.cpp's they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trlpatch.errors import CannotExport


@dataclass(frozen=True)
class FileType:
    """A type of GGUF file, such as q4_k_m.

    Attributes:
        name: what `quantization_method` calls it, and llama-quantize in capitals.
        number: `llama_ftype` of llama.h, written as `general.file_type`.
        base: `ggml_type` of most of its tensors.
        bits: bits per weight of a large model, about; sizes of a plan are exact.
        by_converter: convert_hf_to_gguf.py writes it itself, all weights alike; others are llama-quantize's mixes.
    """

    name: str
    number: int
    base: str
    bits: float
    by_converter: bool = False


_ALL = (
    FileType("f32", 0, "F32", 32.0, by_converter=True),
    FileType("f16", 1, "F16", 16.0, by_converter=True),
    FileType("bf16", 32, "BF16", 16.0, by_converter=True),
    FileType("q8_0", 7, "Q8_0", 8.5, by_converter=True),
    FileType("q6_k", 18, "Q6_K", 6.6),
    FileType("q5_k_m", 17, "Q5_K", 5.7),
    FileType("q5_k_s", 16, "Q5_K", 5.6),
    FileType("q5_1", 9, "Q5_1", 6.0),
    FileType("q5_0", 8, "Q5_0", 5.6),
    FileType("q4_k_m", 15, "Q4_K", 4.9),
    FileType("q4_k_s", 14, "Q4_K", 4.7),
    FileType("q4_1", 3, "Q4_1", 5.1),
    FileType("q4_0", 2, "Q4_0", 4.7),
    FileType("q3_k_l", 13, "Q3_K", 4.3),
    FileType("q3_k_m", 12, "Q3_K", 4.0),
    FileType("q3_k_s", 11, "Q3_K", 3.6),
    FileType("q2_k", 10, "Q2_K", 3.2),
)
FILE_TYPES = {one.name: one for one in _ALL}

FAST = "fast_quantized"
ALIASES = {FAST: "q8_0", "quantized": "q4_k_m", "q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}
NOT_QUANTIZED = "not_quantized"
"""The 16 bits that the checkpoint has: bf16 or f16."""

NEED_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
"""What llama.cpp makes with an importance matrix only, measured on text that is representative of the use."""


def file_types(methods: str | Sequence[str] | None, *, dtype: str) -> list[FileType]:
    """Return what `quantization_method` asks for, each type once, in the order it was asked for.

    Args:
        methods: a name or several (in a list, or between commas), in capitals or not, with Unsloth's aliases; None is
            its "fast_quantized".
        dtype: what the checkpoint is stored as, such as "bfloat16"; `not_quantized` depends on it.

    Raises:
        CannotExport: a name is not one of these types; the message lists them, with the nearest.
    """
    given: object = FAST if methods is None else methods
    if isinstance(given, str):
        given = given.split(",")
    if not isinstance(given, Iterable):
        raise CannotExport(f"quantization_method={given!r}: expected a type such as 'q8_0', or a list of types")
    found: dict[str, FileType] = {}
    for method in given:
        name = method.strip().lower().replace("-", "_") if isinstance(method, str) else ""
        if name == NOT_QUANTIZED:
            name = "bf16" if dtype == "bfloat16" else "f16"
        one = FILE_TYPES.get(ALIASES.get(name, name))
        if one is None:
            raise CannotExport(f"quantization_method={method!r}: {_why(name)}")
        found[one.name] = one
    if not found:
        raise CannotExport("quantization_method is empty: expected a type such as 'q8_0', or a list of types")
    return list(found.values())


def _why(name: str) -> str:
    if name in NEED_IMATRIX or name.startswith("iq"):
        return (
            f"{name} needs llama.cpp's importance matrix (llama-imatrix) or its own tools; expected one of "
            f"{', '.join(FILE_TYPES)}. Export 'f16', and run llama-quantize --imatrix on that file"
        )
    known = [*FILE_TYPES, *ALIASES, NOT_QUANTIZED]
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"expected one of {', '.join(FILE_TYPES)} ({', '.join((*ALIASES, NOT_QUANTIZED))} as aliases){guess}"
