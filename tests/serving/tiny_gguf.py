"""A GGUF file of the tiny Qwen2 of tests/cpu/tiny.py, written with the package gguf: no converter, no compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(model: Path, place: Path, *, quantized: bool = False) -> Path:
    """Write `model` as float32, or with its matrices as Q8_0; return the file."""
    import gguf
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config
    out = gguf.GGUFWriter(place, "qwen2")
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_freq_base(rope["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32)
    _tokenizer(out, model, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    q8 = gguf.GGMLQuantizationType.Q8_0
    with safe_open(model / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            packed = quantized and tensor.ndim == 2
            out.add_tensor(
                names.get_name(name, (".weight", ".bias")),
                gguf.quants.quantize(tensor, q8) if packed else tensor,
                raw_dtype=q8 if packed else None,
            )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return place


def _tokenizer(out: Any, model: Path, config: dict[str, Any]) -> None:
    import gguf

    words = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    added = words["added_tokens"]
    vocabulary = {**words["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    special = {token["id"] for token in added if token["special"]}
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(ordered))]
    merges = words["model"]["merges"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(ordered)
    out.add_token_types(kinds)
    out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_add_bos_token(False)
    out.add_chat_template((model / "chat_template.jinja").read_text(encoding="utf-8"))
