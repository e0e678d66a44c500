"""Real torch modules and real PEFT adapters, a few thousand parameters each."""

from __future__ import annotations

from typing import Any


def base_model() -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


def lora_model(model: Any = None, **changes: Any) -> Any:
    """A PEFT model with LoRA on the attention, rank 4 and alpha 8 unless changed."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(base_model() if model is None else model, LoraConfig(**{**settings, **changes}))


def randomize(model: Any, *, seed: int = 0) -> None:
    """Give every LoRA parameter random values: lora_B starts at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
