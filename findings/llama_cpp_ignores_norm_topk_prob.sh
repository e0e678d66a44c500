#!/usr/bin/env bash
# Two different Qwen3-MoE models become the same GGUF file
#
# One would guess: what changes the output of a model is in its GGUF file, or the converter refuses. norm_topk_prob of
#   Qwen3-MoE decides whether the weights of the chosen experts are made to sum to one.
# What happens: norm_topk_prob is not written for this architecture, and llama.cpp always normalizes. Two checkpoints
#   that differ in nothing but that line of config.json give files with equal bytes, while transformers computes
#   different logits. False is the default of transformers' Qwen3MoeConfig; Qwen's published models say True. A model
#   that was configured from scratch and trained is silently another one in llama.cpp.
# Source: conversion/qwen.py (Qwen3MoeModel) and src/models/qwen3moe.cpp (build_moe_ffn), as vendored by the sdist of
#   llama-cpp-python; transformers/models/qwen3_moe/modeling_qwen3_moe.py (Qwen3MoeTopKRouter).
# Versions: llama-cpp-python 0.3.36, torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   transformers 5.23.0 default of norm_topk_prob: False
#   norm_topk_prob=True: exit status 0, warnings []
#   norm_topk_prob=False: exit status 0, warnings []
#   GGUF files 6d34af8ef0cf and 6d34af8ef0cf; transformers' logits differ by 0.65 of 0.79
#   llama.cpp's graph normalizes: true
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0 transformers==5.23.0 sentencepiece==0.2.1 scikit-build-core
"${pip[@]}" download --no-deps --no-build-isolation --no-binary :all: --dest "$work" llama-cpp-python==0.3.36
tar xzf "$work/llama_cpp_python-0.3.36.tar.gz" -C "$work" llama_cpp_python-0.3.36/vendor/llama.cpp
export LLAMA_CPP="$work/llama_cpp_python-0.3.36/vendor/llama.cpp" WORK="$work" HF_HUB_OFFLINE=1

"$work/venv/bin/python" -W ignore - <<'PY'
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

llama_cpp, work = Path(os.environ["LLAMA_CPP"]), Path(os.environ["WORK"])
transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "default of norm_topk_prob:", Qwen3MoeConfig().norm_topk_prob)

# A vocabulary that the converter can take for a byte-level BPE without knowing its pre-tokenizer: Qwen2's name for it.
convert = work / "convert.py"
convert.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(llama_cpp)!r})
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv[0] = "convert_hf_to_gguf.py"
runpy.run_path({str(llama_cpp / "convert_hf_to_gguf.py")!r}, run_name="__main__")
""")
letters = {letter: number for number, letter in enumerate(["<eos>", *map(chr, range(97, 123)), "ab"])}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[("a", "b")]))


def made(normalize):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=normalize)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, num_key_value_heads=4, head_dim=16)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    folder = work / str(normalize) / "model"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(32)[None]).logits
    file = work / f"{normalize}.gguf"
    command = [sys.executable, str(convert), str(folder), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("WARNING") and "norm" in line]
    print(f"norm_topk_prob={normalize}: exit status {done.returncode}, warnings {said}")
    assert (done.returncode, said) == (0, []), done.stderr[-2000:]
    return logits, hashlib.sha256(file.read_bytes()).hexdigest()


(one, first), (other, second) = made(True), made(False)
difference = float((one - other).abs().max())
print(f"GGUF files {first[:12]} and {second[:12]}; transformers' logits differ by {difference:.2f} of {float(one.std()):.2f}")
graph = (llama_cpp / "src/models/qwen3moe.cpp").read_text()
normalized = re.search(r"LLM_FFN_SILU, (\w+),", graph)[1]
print("llama.cpp's graph normalizes:", normalized)
assert first == second
assert difference > 0.1
assert normalized == "true"
PY
