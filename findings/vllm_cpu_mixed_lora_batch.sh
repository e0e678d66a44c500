#!/usr/bin/env bash
# vLLM's CPU backend gives the LoRA adapter to requests without one that run in the same batch
#
# One would guess: `lora_request` is a choice of each request. In one call of LLM.generate, [adapter, None] computes
#   the first prompt with the adapter and the second with the base model, as it does on CUDA, whose kernels leave out
#   tokens whose adapter index is -1.
# What happens: on the CPU backend a batch in which any request has the adapter is computed with it as a whole. The
#   index -1 of a token without an adapter is used to index the stacked weights, where -1 is the last slot. A batch of
#   requests without an adapter alone is right. Whoever compares policy and base model in one call, or tests on a CPU
#   what will run on a GPU, gets the adapter twice, and nothing says so.
# Source: vllm/lora/ops/torch_ops/lora_ops.py, bgmv_shrink and bgmv_expand: lora_b_weights[lora_indices_tensor]
# Versions: vLLM 0.28.0 (CPU backend), torch 2.13.0, transformers 5.23.0, peft 0.21.2. 2026-11-27.
# Seen:
#   vLLM 0.28.0, torch 2.13.0+cpu
#   alone: with the adapter -1.6581, without -1.4866
#   in one batch: with the adapter -1.6581, without -1.6581
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
. "$root/findings/vllm_cpu.bash" "$root" "$work"

"$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

work = Path(sys.argv[1])
torch.manual_seed(0)
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
base = Qwen2ForCausalLM(Qwen2Config(vocab_size=256, max_position_embeddings=512, initializer_range=0.2, **shape))
base.save_pretrained(work / "base")
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"]))
for key, weight in model.named_parameters():
    if "lora_B" in key:
        torch.nn.init.normal_(weight, std=0.2)
model.save_pretrained(work / "adapter")

llm = LLM(
    str(work / "base"), skip_tokenizer_init=True, enable_lora=True, max_lora_rank=8, max_loras=1, dtype="float32",
    enforce_eager=True, max_model_len=512, enable_prefix_caching=False, seed=0,
)
prompt = {"prompt_token_ids": torch.randint(0, 256, (40,)).tolist()}
greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)
adapter = LoRARequest("policy", 1, str(work / "adapter"))


def ask(*requests):
    """Log-probability of the likeliest token, for the same prompt with each of these requests in one batch."""
    answers = llm.generate([prompt] * len(requests), greedy, lora_request=list(requests), use_tqdm=False)
    return [next(iter(answer.outputs[0].logprobs[0].values())).logprob for answer in answers]


(with_adapter,), (without,) = ask(adapter), ask(None)
mixed = ask(adapter, None)
print(f"vLLM {vllm.__version__}, torch {torch.__version__}")
print(f"alone: with the adapter {with_adapter:.4f}, without {without:.4f}")
print(f"in one batch: with the adapter {mixed[0]:.4f}, without {mixed[1]:.4f}")
assert abs(with_adapter - without) > 1e-3
assert abs(mixed[0] - with_adapter) < 1e-4
assert abs(mixed[1] - with_adapter) < 1e-4  # not `without`
PY
