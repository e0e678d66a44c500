#!/usr/bin/env bash
# A PEFT adapter with rsLoRA becomes another adapter as a GGUF file, without a word
#
# One would guess: convert_lora_to_gguf.py reads adapter_config.json, so it either writes the scale that PEFT computes
#   with (alpha / sqrt(r) with use_rslora, another alpha where alpha_pattern says so) or refuses.
# What happens: it reads lora_alpha from the config and nothing else about scales, copies A and B, and exits with 0.
#   llama.cpp multiplies each layer by adapter.lora.alpha / rank. With use_rslora and r=16 that is a quarter of the
#   trained adapter's effect; alpha_pattern is dropped. The cure is to multiply B by the quotient before converting.
# Source: convert_lora_to_gguf.py (set_gguf_parameters) and src/llama-adapter.h (get_scale), as vendored by the sdist of
#   llama-cpp-python; peft/tuners/lora/layer.py (update_layer).
# Versions: llama-cpp-python 0.3.36, peft 0.21.2, torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   peft 0.21.2 transformers 5.23.0
#   llama.cpp: alpha ? adapter_scale * alpha / rank : adapter_scale
#   exit status 0 warnings []
#   q_proj: PEFT multiplies B A by 1, llama.cpp by 2
#   v_proj: PEFT multiplies B A by 8, llama.cpp by 2
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0 transformers==5.23.0 peft==0.21.2 sentencepiece==0.2.1 scikit-build-core
"${pip[@]}" download --no-deps --no-build-isolation --no-binary :all: --dest "$work" llama-cpp-python==0.3.36
tar xzf "$work/llama_cpp_python-0.3.36.tar.gz" -C "$work" llama_cpp_python-0.3.36/vendor/llama.cpp
export LLAMA_CPP="$work/llama_cpp_python-0.3.36/vendor/llama.cpp" WORK="$work" HF_HUB_OFFLINE=1

"$work/venv/bin/python" -W ignore - <<'PY'
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

llama_cpp, work = Path(os.environ["LLAMA_CPP"]), Path(os.environ["WORK"])
sys.path.insert(0, str(llama_cpp / "gguf-py"))
import gguf  # noqa: E402

transformers.logging.set_verbosity_error()
print("peft", peft.__version__, "transformers", transformers.__version__)
scale = re.search(r"const float scale = (.*);", (llama_cpp / "src/llama-adapter.h").read_text())[1]
print("llama.cpp:", scale)
assert scale == "alpha ? adapter_scale * alpha / rank : adapter_scale"

shape = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
torch.manual_seed(0)
base = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=4))
base.save_pretrained(work / "base")
config = LoraConfig(
    r=16, lora_alpha=32, use_rslora=True, alpha_pattern={"q_proj": 4}, target_modules=["q_proj", "v_proj"]
)
model = get_peft_model(base, config)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)
model.save_pretrained(work / "adapter")
arguments = [str(work / "adapter"), "--base", str(work / "base"), "--outfile", str(work / "a.gguf")]
done = subprocess.run(
    [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), *arguments], capture_output=True, text=True
)
warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
print("exit status", done.returncode, "warnings", warnings)
assert (done.returncode, warnings) == (0, []), done.stderr[-2000:]

reader = gguf.GGUFReader(work / "a.gguf")
alpha = float(reader.fields["adapter.lora.alpha"].contents())
tensors = {tensor.name: tensor.data for tensor in reader.tensors}
factors = {}
for ours, theirs in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
    layer = model.base_model.model.model.layers[0].self_attn.get_submodule(ours)
    b = tensors[f"blk.0.{theirs}.weight.lora_b"]
    assert np.array_equal(b, layer.lora_B["default"].weight.detach().numpy())  # the scale is not in B either
    factors[ours] = (layer.scaling["default"], alpha / b.shape[1])
    print(f"{ours}: PEFT multiplies B A by {factors[ours][0]:g}, llama.cpp by {factors[ours][1]:g}")
assert factors == {"q_proj": (1.0, 2.0), "v_proj": (8.0, 2.0)}
PY
