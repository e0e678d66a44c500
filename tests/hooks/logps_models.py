"""Tiny random models of several architectures, and TRL's way from a model to log-probabilities, hooked or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.nn import functional

from trlpatch import hooks

VOCABULARY = 211
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "granite": ("Granite", {"logits_scaling": 0.25}),
    "cohere": ("Cohere", {"logit_scale": 3.0}),
    "phi": ("Phi", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt_neox": ("GPTNeoX", {}),
}
"""Name -> prefix of its classes, and settings. Phi's head has a bias, Granite and Cohere scale, Gemma 2 caps."""


def model(name: str, **changes: Any) -> Any:
    prefix, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **settings, **changes})
    made = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def trainer(temperature: float = 0.9) -> Any:
    """Return what TRL's methods need of a trainer; it can be referred to weakly."""
    return _Trainer(temperature)


class _Trainer(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, temperature: float) -> None:
        super().__init__(temperature=temperature)


def log_softmax(logits: Any, index: Any, temperature: float = 1.0, row_mask: Any = None) -> Any:
    logits = logits / temperature if temperature != 1.0 else logits
    if logits.dtype == torch.float32:
        picked = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        found = picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    else:
        found = torch.stack(
            [functional.log_softmax(r, -1).gather(-1, i[:, None])[:, 0] for r, i in zip(logits, index, strict=True)]
        )
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def entropy(logits: Any) -> Any:
    found = []
    for rows in logits.reshape(-1, logits.shape[-1]).split(128):
        logps = functional.log_softmax(rows, dim=-1)
        found.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(found).reshape(logits.shape[:-1])


def both(logits: Any, index: Any, entropy_requires_grad: bool = True, **others: Any) -> Any:
    found = log_softmax(logits, index, **others)
    logits = logits / others["temperature"]
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_requires_grad):
        return found, entropy(logits)


def per_token(owner: Any, model: Any, inputs: dict[str, Any], keep: int, *, hooked: bool, **options: Any) -> Any:
    """Return log-probabilities and entropies as TRL does: `form` is "0.18", "0.29", "1.9" or "1.14"."""
    form, bonus = options.get("form", "0.29"), options.get("bonus", False)
    forward = hooks.deferred_logits(owner, model) if hooked else model
    logits = forward(**inputs, logits_to_keep=keep + 1, use_cache=False).logits
    logits = logits[:, :-1, :]
    logits = logits[:, -keep:, :]
    index, mask = inputs["input_ids"][:, -keep:], inputs["attention_mask"][:, -keep:]
    if form == "1.14":
        pair = hooks.selective_log_softmax_and_entropy(both) if hooked else both
        return pair(logits, index, entropy_requires_grad=bonus, temperature=owner.temperature, row_mask=mask)
    if form == "1.9":
        logits.div_(owner.temperature)
    else:
        logits = logits / owner.temperature
    if form == "0.18":
        return (hooks.selective_log_softmax(log_softmax) if hooked else log_softmax)(logits, index), None
    first = hooks.selective_log_softmax(log_softmax, entropy, True) if hooked else log_softmax
    logps = first(logits, index)
    with torch.set_grad_enabled(torch.is_grad_enabled() and bonus):
        return logps, (hooks.entropy_from_logits(entropy) if hooked else entropy)(logits)


def batch(rows: int = 4, length: int = 40) -> dict[str, Any]:
    """Return input ids and a mask that pads on the left and on the right."""
    torch.manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, -6:] = 0
    return {"input_ids": torch.randint(1, VOCABULARY, (rows, length)), "attention_mask": mask}
