"""Which tensor gets which type: what llama.cpp's quantizer decides per file type, without an importance matrix.

llama.cpp, src/llama-quant.cpp: `tensor_allows_quantization`, `llama_tensor_get_type_impl`, `tensor_type_fallback`, as
vendored by llama-cpp-python 0.3.36. tests/export_gguf compares with the types that llama-quantize itself gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trlpatch.export.gguf.file_types import FileType

Shape = tuple[int, ...]
"""Of a tensor as NumPy and torch have it: rows last but one, the row's length last."""

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""(weights, bytes) of a block. Blocks never cross a row."""

_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows whose length is no multiple of 256."""

_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
"""Parts of names of tensors that stay as they are."""

_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip

OTHER_RULES = ("falcon", "glm5-next")
"""Architectures for which llama.cpp has rules of their own that are not here."""


@dataclass(frozen=True)
class Architecture:
    """What of a model the mixes depend on, as the GGUF's metadata has it."""

    name: str
    layers: int
    heads: int
    heads_kv: int
    experts: int

    @classmethod
    def of(cls, metadata: Mapping[str, object]) -> Architecture:
        """Read it from the metadata of a GGUF file."""
        name = str(metadata["general.architecture"])

        def number(key: str, default: int) -> int:
            value = metadata.get(f"{name}.{key}", default)
            first = value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value
            return int(str(first))

        heads = number("attention.head_count", 1)
        heads_kv = number("attention.head_count_kv", heads)
        return cls(name, number("block_count", 0), heads, heads_kv, number("expert_count", 0))

    @property
    def heads_per_kv(self) -> int:
        """`n_gqa` of llama.cpp; 0 without key-value heads."""
        return self.heads // self.heads_kv if self.heads_kv else 0

    @property
    def is_70b(self) -> bool:
        """Does llama.cpp take it for a model of 70B parameters? There attn_v is 8 times smaller than attn_q."""
        if self.name == "llama":
            return self.layers == 80 and self.heads != self.heads_kv
        return self.layers == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.name)


def nbytes(kind: str, shape: Shape) -> int:
    """Bytes of a tensor of this type."""
    weights, size = BLOCKS[kind]
    count = 1
    for dimension in shape:
        count *= dimension
    return count // weights * size


def quantizable(name: str, shape: Shape) -> bool:
    """Does llama.cpp quantize this tensor at all?"""
    rows = [size for size in shape[:-1] if size > 1]
    if not rows or not name.endswith("weight"):
        return False
    if name in ("position_embd.weight", "token_types.weight"):
        return False
    return not any(part in name for part in _KEPT)


def plain_type(kind: str, file_type: FileType, shape: Shape) -> str:
    """Return the type that convert_hf_to_gguf.py gives to a weight that it has nothing special for.

    `kind` is what it gave when asked for bf16: BF16 where it is free to choose.
    """
    if kind != "BF16":
        return kind
    fits = shape[-1] % BLOCKS[file_type.base][0] == 0
    return file_type.base if fits else "F16"


def mixed_types(file_type: FileType, shapes: Mapping[str, Shape], arch: Architecture) -> dict[str, str]:
    """Return the type of each tensor of a file that llama-quantize would make from one in float32."""
    return _Mix(file_type, shapes, arch).types()


def by_layer(name: str) -> tuple[int, str]:
    """Order of tensors in llama.cpp's loader, and so of its counters: by layer, then by name."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


class _Mix:
    def __init__(self, file_type: FileType, shapes: Mapping[str, Shape], arch: Architecture) -> None:
        self.file, self.shapes, self.arch = file_type.name, shapes, arch
        self.base = file_type.base
        self.tied = "output.weight" not in shapes
        self.values = sum(category(name) == "attn_v" for name in shapes)
        self.seen_values = self.seen_down = 0

    def types(self) -> dict[str, str]:
        found = {}
        for name in sorted(self.shapes, key=by_layer):
            shape = self.shapes[name]
            found[name] = fitting(self._wanted(name, shape), shape) if quantizable(name, shape) else "F32"
        return found

    def _wanted(self, name: str, shape: Shape) -> str:
        kind = category(name)
        if kind == "output" or (self.tied and kind == "token_embd"):
            if shape[-1] % BLOCKS[self.base][0]:
                return "Q8_0"
            return "Q8_0" if self.base == "Q8_0" else "Q6_K"
        if kind == "attn_v":
            return self._attn_v()
        if kind == "attn_k" and self.arch.experts == 8:
            return "Q8_0"
        if kind == "ffn_down":
            return self._ffn_down(name)
        if kind == "attn_output":
            return self._attn_output()
        return self.base

    def _attn_v(self) -> str:
        layer, self.seen_values = self.seen_values, self.seen_values + 1
        wide = self.arch.heads_per_kv >= 4
        wanted = {
            "q2_k": "Q4_K" if wide else "Q3_K",
            "q3_k_m": "Q5_K" if layer < 2 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if layer < 4 else "Q4_K",
            "q4_k_m": "Q6_K" if more_bits(layer, self.values) else "Q4_K",
            "q5_k_m": "Q6_K" if more_bits(layer, self.values) else "Q5_K",
        }.get(self.file, self.base)
        if self.arch.is_70b and wanted in ("Q3_K", "Q4_K"):
            wanted = "Q5_K"
        return "Q8_0" if self.arch.experts == 8 else wanted

    def _ffn_down(self, name: str) -> str:
        layer, self.seen_down = self.seen_down, self.seen_down + 1
        if self.arch.experts > 1:
            layer = by_layer(name)[0]
        layers = self.arch.layers
        return {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if layer < layers // 16 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if layer < layers // 8 else "Q4_K",
            "q4_k_m": "Q6_K" if more_bits(layer, layers) else "Q4_K",
            "q5_k_m": "Q6_K" if more_bits(layer, layers) else "Q5_K",
        }.get(self.file, self.base)

    def _attn_output(self) -> str:
        if self.arch.experts == 8:
            raised = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
            return "Q5_K" if self.file in raised else self.base
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(self.file, self.base)


def category(name: str) -> str:
    """Return what a tensor is for, as far as the mixes tell tensors apart."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((kind for part, kind in _CATEGORIES if part in name), "other")


def more_bits(layer: int, layers: int) -> bool:
    """Is this one of the layers whose attn_v and ffn_down get two more bits: the ends, and every third between?"""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def fitting(kind: str, shape: Shape) -> str:
    """Return the type, or the one that llama.cpp falls back to where rows are no multiple of its blocks."""
    if shape[-1] % BLOCKS[kind][0] == 0:
        return kind
    kind = _FALLBACK.get(kind, kind)
    return kind if shape[-1] % BLOCKS[kind][0] == 0 else "F16"
