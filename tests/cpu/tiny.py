"""A model, a tokenizer, an engine and data small enough to train with a real vLLM on two CPU cores.

vLLM reads its environment when it is imported, so import this module before vllm.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# One unbound thread: the model is tiny, and bound OpenMP threads that spin on a busy machine are three times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import ports
from tests.words import byte_tokenizer

ports.own()

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_CORPUS = (
    "the cat sat on the mat and the dog ran in the park while the sun shone",
    "one two three four five six seven eight nine ten",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
)


def tokenizer() -> Any:
    """Train a tokenizer of fewer than 400 tokens."""
    return byte_tokenizer(list(_CORPUS) * 20, vocabulary=384)


def checkpoint(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random-weight Qwen2 (hidden 256, 2 layers, float32, unless changed) and its tokenizer; return where.

    The weights are 2.5 times as large as transformers' default, so that a low-rank change of the hidden states moves
    the logits visibly within thirty steps.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer()
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "initializer_range": 0.05,
    }
    config = Qwen2Config(**{**settings, **changes})
    Qwen2ForCausalLM(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def engine(model: Path, **changes: Any) -> Any:
    """Build the one vLLM engine of this process: float32, eager, LoRA up to rank 16 unless changed."""
    import torch
    from vllm import LLM

    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 1,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
    }
    made = LLM(**{**settings, **changes})
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late where torch was imported before this module
    return made


def policy(model: Path, **changes: Any) -> Any:
    """Load the checkpoint and give it a LoRA adapter: rank 8, alpha 16, all linear layers, unless changed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    return get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**{**lora_settings(), **changes}))


def lora_settings() -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}


def move(model: Any, *, seed: int, size: float = 0.05) -> None:
    """Change every LoRA parameter in place, as an optimizer step would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def prompts(count: int, *, words: int = 4) -> list[str]:
    """Different short prompts, none a prefix of another."""
    vocabulary = " ".join(_CORPUS).split()
    size = len(vocabulary)
    return [" ".join(vocabulary[(i + k * (1 + i // size)) % size] for k in range(words)) for i in range(count)]


def dataset(count: int = 64, *, conversational: bool = False) -> Any:
    from datasets import Dataset

    texts = prompts(count)
    if conversational:
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})
    return Dataset.from_dict({"prompt": texts})


def trainer_logprobs(
    model: Any, prompt: Sequence[int], completion: Sequence[int], *, temperature: float = 1.0, top_k: int = 0
) -> Any:
    """Log-probabilities of the completion's tokens under the training model, shape [len(completion)], float32.

    With `top_k` above 0 those of sampling among the `top_k` likeliest tokens only.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *completion]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
            if top_k > 0:
                logits = logits.where(logits >= logits.topk(top_k).values[:, -1:], float("-inf"))
            picked = torch.log_softmax(logits, dim=-1)
            return picked.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()
    finally:
        model.train(was_training)


def engine_logprobs(output: Any, index: int = 0) -> Any:
    """Log-probabilities that the engine reports for its own sampled tokens, shape [len(completion)], float32."""
    import torch

    sequence = output.outputs[index]
    return torch.tensor(
        [step[token].logprob for step, token in zip(sequence.logprobs, sequence.token_ids, strict=True)]
    )
