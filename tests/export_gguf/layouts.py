"""Tensors of models as GGUF files have them, by a few numbers; no data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOCABULARY = 512
LETTERS = {
    "f": "F32", "h": "F16", "8": "Q8_0", "6": "Q6_K", "5": "Q5_K", "4": "Q4_K", "3": "Q3_K", "2": "Q2_K", "v": "Q5_0",
    "w": "Q5_1", "q": "Q4_0", "r": "Q4_1",
}  # fmt: skip
"""What llama_quantize_types.json writes for a type, a letter per tensor."""


def tensors(case: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape as NumPy has it)."""
    hidden, ffn, arch = case["hidden"], case["ffn"], case["arch"]
    query, value = case["heads"] * case["head_dim"], case["heads_kv"] * case["head_dim"]
    yield "token_embd.weight", (VOCABULARY, hidden)
    yield "output_norm.weight", (hidden,)
    if not case["tied"]:
        yield "output.weight", (VOCABULARY, hidden)
    for layer in range(case["layers"]):
        for name, shape in _layer(arch, hidden, ffn, query, value, case["experts"]):
            yield f"blk.{layer}.{name}", shape


def _layer(
    arch: str, hidden: int, ffn: int, query: int, value: int, experts: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attn_norm.weight", (hidden,)
    yield "ffn_norm.weight", (hidden,)
    if arch == "phi3":
        yield "attn_qkv.weight", (query + 2 * value, hidden)
    else:
        yield "attn_q.weight", (query, hidden)
        yield "attn_k.weight", (value, hidden)
        yield "attn_v.weight", (value, hidden)
    if arch == "qwen2":
        yield "attn_v.bias", (value,)
    yield "attn_output.weight", (hidden, query)
    if experts:
        yield "ffn_gate_inp.weight", (experts, hidden)
        yield "ffn_gate_exps.weight", (experts, ffn, hidden)
        yield "ffn_up_exps.weight", (experts, ffn, hidden)
        yield "ffn_down_exps.weight", (experts, hidden, ffn)
        return
    if arch != "phi3":
        yield "ffn_gate.weight", (ffn, hidden)
    yield "ffn_up.weight", (2 * ffn if arch == "phi3" else ffn, hidden)
    yield "ffn_down.weight", (hidden, ffn)
