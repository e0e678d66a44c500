"""The tokenizer of the models that tests make up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def byte_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens on the spot, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        # transformers 4 adds token_type_ids, which TRL up to 0.28 hands to generate and Qwen2 does not take.
        model_input_names=["input_ids", "attention_mask"],
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made
