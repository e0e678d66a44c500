"""A tokenizer and a model small enough to learn while one watches, made without a model hub."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from trlpatch.loading.lora_targets import LINEARS

if TYPE_CHECKING:
    from pathlib import Path

WORDS = (
    "the",
    "a",
    "red",
    "blue",
    "green",
    "stone",
    "river",
    "tree",
    "bird",
    "sings",
    "grows",
    "flows",
    "falls",
    "night",
)
VOCABULARY = 384
PROMPT_WORDS = 6


def corpus(lines: int, seed: int) -> list[str]:
    """Return sentences of random words and numbers."""
    dice = random.Random(seed)
    return [
        " ".join(dice.choice([*WORDS, str(dice.randrange(1000))]) for _ in range(PROMPT_WORDS)) for _ in range(lines)
    ]


def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(400, seed=0), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(tokens: Any, seed: int) -> Any:
    """Return a Qwen2 of 2 layers and random weights; wide initial logits, so that a LoRA can move them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        use_sliding_window=False,
    )
    return Qwen2ForCausalLM(config).to(torch.float32)


def with_lora(base: Any) -> Any:
    """Return `base` as a PEFT model with a LoRA on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    return get_peft_model(base, settings)


def save(base: Any, tokens: Any, directory: Path) -> None:
    """Save model and tokenizer where an engine can load them."""
    base.save_pretrained(directory)
    tokens.save_pretrained(directory)
