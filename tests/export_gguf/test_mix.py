"""The types of tensors are those that llama-quantize gives, for every tensor of every layout and file type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.export_gguf.layouts import LETTERS, tensors
from trlpatch.export.gguf.file_types import FILE_TYPES
from trlpatch.export.gguf.mix import Architecture, mixed_types, nbytes, plain_type, quantizable

# Written by llama-quantize --dry-run (llama.cpp of llama-cpp-python 0.3.36) on f32 files with these tensors.
CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "llama_quantize_types.json").read_text(encoding="utf-8")
)


def architecture(case: dict[str, Any]) -> Architecture:
    return Architecture(case["arch"], case["layers"], case["heads"], case["heads_kv"], case["experts"])


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['arch']}-{case['layers']}-{case['hidden']}-{case['experts']}"
)
def test_types_are_those_of_llama_quantize(case: dict[str, Any]) -> None:
    shapes = dict(tensors(case))
    assert case["types"].keys() == FILE_TYPES.keys() - {"f32", "f16", "bf16"}
    for name, letters in case["types"].items():
        assert len(letters) == len(shapes)
        wanted = {tensor: LETTERS[letter] for tensor, letter in zip(shapes, letters, strict=True)}
        assert mixed_types(FILE_TYPES[name], shapes, architecture(case)) == wanted, name


def test_the_cases_reach_every_rule() -> None:
    seen = {letter for case in CASES for letters in case["types"].values() for letter in letters}
    assert seen == LETTERS.keys()
    assert {architecture(case).is_70b for case in CASES} == {True, False}
    assert {case["experts"] for case in CASES} == {0, 4, 8}


def test_what_the_converter_forces_stays() -> None:
    q8_0, f16 = FILE_TYPES["q8_0"], FILE_TYPES["f16"]
    assert plain_type("F32", q8_0, (64,)) == "F32"
    assert plain_type("BF16", q8_0, (8, 64)) == "Q8_0"
    assert plain_type("BF16", q8_0, (8, 48)) == "F16"  # rows are no multiple of a block
    assert plain_type("BF16", f16, (8, 48)) == "F16"


def test_sizes() -> None:
    assert nbytes("F32", (3, 5)) == 60
    assert nbytes("Q8_0", (2, 64)) == 2 * 2 * 34
    assert nbytes("Q4_K", (2, 3, 512)) == 6 * 2 * 144


@pytest.mark.parametrize(
    ("name", "shape", "answer"),
    [
        ("blk.0.attn_q.weight", (64, 64), True),
        ("blk.0.attn_q.bias", (64,), False),
        ("blk.0.attn_q.weight", (1, 64), False),  # one row is a vector to llama.cpp
        ("blk.0.attn_norm.weight", (64, 64), False),
        ("blk.0.ffn_gate_inp.weight", (8, 64), False),
        ("position_embd.weight", (64, 64), False),
    ],
)
def test_what_is_quantized_at_all(name: str, shape: tuple[int, ...], answer: bool) -> None:
    assert quantizable(name, shape) is answer


def test_architecture_is_read_from_metadata() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 80,
        "llama.attention.head_count": [64, 64],
        "llama.attention.head_count_kv": 8,
    }
    found = Architecture.of(metadata)
    assert found == Architecture("llama", 80, 64, 8, 0)
    assert found.is_70b
    assert found.heads_per_kv == 8
