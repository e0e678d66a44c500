#!/usr/bin/env bash
# vLLM's prefix cache tells LoRA adapters apart by their name alone
#
# One would guess: an adapter is its lora_int_id and its path. Two requests with different ids and different
#   directories share no KV cache, whatever `lora_name` says; the name is a label for logs.
# What happens: the block hash has the name and neither id nor path. A prompt that was run with adapter A is served to
#   adapter B from A's KV cache if both have the same name. B's answer is computed from the wrong keys and values, and
#   nothing says so. Giving each version of an adapter a name of its own, or reset_prefix_cache(), avoids it.
# Source: vllm/v1/core/kv_cache_utils.py, _gen_lora_extra_hash_keys: [request.lora_request.lora_name]
# Versions: vLLM 0.28.0 (CPU backend), torch 2.13.0, transformers 5.23.0, peft 0.21.2. 2026-11-27.
# Seen:
#   vLLM 0.28.0, torch 2.13.0+cpu
#   adapter b alone: 0 of 400 prompt tokens from the cache, log-probability -2.0402
#   adapter b after a, same name: 384 of 400 prompt tokens from the cache, log-probability -0.8321
#   adapter b after a, another name: 0 of 400 prompt tokens from the cache, log-probability -2.0402
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
for name in ("a", "b"):
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"]))
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(work / name)
    base = model.unload()

llm = LLM(
    str(work / "base"), skip_tokenizer_init=True, enable_lora=True, max_lora_rank=8, max_loras=2, dtype="float32",
    enforce_eager=True, max_model_len=512, enable_prefix_caching=True, seed=0,
)
prompt = {"prompt_token_ids": torch.randint(0, 256, (400,)).tolist()}
greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)


def ask(adapter, name, number):
    (answer,) = llm.generate([prompt], greedy, lora_request=LoRARequest(name, number, str(work / adapter)), use_tqdm=False)
    (token,) = answer.outputs[0].token_ids
    return answer.num_cached_tokens, answer.outputs[0].logprobs[0][token].logprob


alone = ask("b", "right", 1)
llm.reset_prefix_cache()
ask("a", "policy", 2)
same_name = ask("b", "policy", 3)
other_name = ask("b", "policy-2", 4)
print(f"vLLM {vllm.__version__}, torch {torch.__version__}")
for label, (cached, logprob) in {
    "alone": alone, "after a, same name": same_name, "after a, another name": other_name
}.items():
    print(f"adapter b {label}: {cached} of 400 prompt tokens from the cache, log-probability {logprob:.4f}")
assert alone[0] == other_name[0] == 0 and abs(alone[1] - other_name[1]) < 1e-4
assert same_name[0] > 100 and abs(alone[1] - same_name[1]) > 1e-3
PY
