"""Adapters of every kind that PEFT trains on a small model, with weights as after some training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.words import byte_tokenizer

LINEARS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
_TEXT = ["the cat sat on the mat", "one two three four five six", "0 1 2 3 4 5 6 7 8 9"]


@dataclass(frozen=True)
class Kind:
    """An adapter, and what becomes of it."""

    name: str
    adapter: dict[str, Any] = field(default_factory=dict)
    """Arguments of the config class."""
    config: str = "LoraConfig"
    model: str = "qwen2"
    tied: bool = False
    before: Callable[[Any], None] | None = None
    """What is done to the base model before the adapter is made."""
    untied: bool = False
    """The export has input and output embeddings apart."""
    refused: str | None = None
    """A part of the reason, for all ways."""
    refused_saved: str | None = None
    """A part of the reason, for an adapter's files."""
    needs: str | None = None
    """A field that the config class must have."""


def _resize(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 16)


KINDS = [
    Kind("plain", {"target_modules": LINEARS}),
    Kind("all-linear", {"target_modules": "all-linear"}),
    Kind("rslora", {"target_modules": LINEARS, "use_rslora": True, "r": 16}),
    Kind("rank_pattern", {"target_modules": LINEARS, "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12}}),
    Kind("alpha_pattern", {"target_modules": LINEARS, "alpha_pattern": {"v_proj": 64}}),
    Kind("dora", {"target_modules": LINEARS, "use_dora": True}),
    Kind("lm_head", {"target_modules": ["q_proj", "lm_head"]}),
    Kind("embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
    Kind("tied: lm_head", {"target_modules": ["q_proj", "lm_head"]}, tied=True, untied=True),
    Kind("tied: embedding", {"target_modules": ["q_proj", "embed_tokens"]}, tied=True, untied=True),
    Kind("tied: plain", {"target_modules": LINEARS}, tied=True),
    Kind("modules_to_save: lm_head", {"target_modules": LINEARS, "modules_to_save": ["lm_head"]}),
    Kind("modules_to_save: norm", {"target_modules": LINEARS, "modules_to_save": ["norm"]}),
    Kind(
        "tied: modules_to_save lm_head", {"target_modules": LINEARS, "modules_to_save": ["lm_head"]}, tied=True,
        untied=True,
    ),
    Kind(
        "tied: modules_to_save embed_tokens", {"target_modules": LINEARS, "modules_to_save": ["embed_tokens"]},
        tied=True, untied=True,
    ),
    Kind(
        "tied: ensure_weight_tying",
        {"target_modules": LINEARS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        tied=True, needs="ensure_weight_tying",
    ),
    Kind("trainable_token_indices", {"target_modules": LINEARS, "trainable_token_indices": {"embed_tokens": [3, 7]}}),
    Kind(
        "tied: trainable_token_indices",
        {"target_modules": LINEARS, "trainable_token_indices": {"embed_tokens": [3, 7]}}, tied=True,
    ),
    Kind(
        "resized vocabulary", {"target_modules": LINEARS, "modules_to_save": ["embed_tokens", "lm_head"]},
        before=_resize,
    ),
    Kind("tied: resized vocabulary", {"target_modules": LINEARS}, tied=True, before=_resize),
    Kind("bias=all", {"target_modules": LINEARS, "bias": "all"}),
    Kind("lora_bias", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    Kind("lora_bias without a bias", {"target_modules": ["o_proj"], "lora_bias": True}, refused="has none in the"),
    Kind("fan_in_fan_out", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, model="gpt2", tied=True),
    Kind("experts", {"target_modules": ["q_proj"]}, model="moe"),
    Kind(
        "target_parameters",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        model="moe", needs="target_parameters",
    ),
    Kind("pissa", {"target_modules": LINEARS, "init_lora_weights": "pissa"}, refused_saved="took the initial"),
    Kind("olora", {"target_modules": LINEARS, "init_lora_weights": "olora"}, refused_saved="took the initial"),
    Kind("loha", {"target_modules": LINEARS}, config="LoHaConfig"),
    Kind("lokr", {"target_modules": LINEARS}, config="LoKrConfig"),
    Kind("ia3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, config="IA3Config"),
    Kind("adalora", {"target_modules": LINEARS, "total_step": 100, "tinit": 10, "tfinal": 50}, config="AdaLoraConfig"),
    Kind("oft", {"target_modules": LINEARS, "oft_block_size": 32}, config="OFTConfig"),
    Kind("vera", {"target_modules": ["q_proj", "o_proj"], "r": 8}, config="VeraConfig", refused="share projections"),
    Kind("prompt tuning", {"num_virtual_tokens": 4}, config="PromptTuningConfig", refused="is no change of the base"),
]  # fmt: skip


def base_model(directory: Path, kind: Kind) -> Any:
    """Save a small random model of the kind, with a tokenizer, and load it in float32."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    words = byte_tokenizer(_TEXT * 20, vocabulary=320)
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": kind.tied, "initializer_range": 0.1,
        "bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    if kind.model == "qwen2":
        config: Any = transformers.Qwen2Config(**shared)
    elif kind.model == "moe":
        config = transformers.Qwen3MoeConfig(
            **shared,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=1,
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=len(words), n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1
        )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory).float().eval()


def adapted(directory: Path, kind: Kind) -> Any:
    """The PEFT model, each trainable weight moved at random."""
    import peft
    import torch

    model = base_model(directory, kind)
    if kind.before is not None:
        kind.before(model)
    arguments = {"task_type": "CAUSAL_LM", **kind.adapter}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = peft.get_peft_model(model, getattr(peft, kind.config)(**arguments)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return found


def logits(model: Any, vocabulary: int) -> Any:
    """Of a fixed prompt, in float32."""
    import torch

    ids = torch.tensor([[(number * 37 + 5) % vocabulary for number in range(20)]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
