#!/usr/bin/env bash
# Merging a young LoRA adapter into a bfloat16 model loses most of it
#
# One would guess: merging is exact up to rounding: W + s*B@A rounded to bfloat16 is off by less than half a percent of
#   the weight, which is what serving in bfloat16 costs anyway. The merged model is the trained one.
# What happens: the rounding is measured against the weight, the update is much smaller than the weight. After an RL
#   run with a small learning rate (B about 1e-4) most elements round back to where they were, and the merged model
#   misses most of what the adapter does to the logits. float16 has three more bits and loses a sixth of it, float32
#   loses nothing: merge in float32, and look at what the conversion leaves.
# Source: peft/tuners/lora/layer.py, Linear.merge; measured here, all logits computed in float32.
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   peft 0.21.2 torch 2.13.0+cpu
#   B ~ 0.0001, merged in torch.bfloat16: 71% of the weights unmoved, 71% of the effect missed
#   B ~ 0.0001, merged in torch.float16: 17% of the weights unmoved, 15% of the effect missed
#   B ~ 0.0001, merged in torch.float32: 0% of the weights unmoved, 0% of the effect missed
#   B ~ 0.001, merged in torch.bfloat16: 14% of the weights unmoved, 12% of the effect missed
#   B ~ 0.001, merged in torch.float16: 2% of the weights unmoved, 1% of the effect missed
#   B ~ 0.001, merged in torch.float32: 0% of the weights unmoved, 0% of the effect missed
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM


def adapted(dtype, size):
    """Return the same bfloat16 checkpoint, held in `dtype`, with the same float32 adapter."""
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8)
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=512, num_key_value_heads=4, **shape)).to(torch.bfloat16).to(dtype)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(128).reshape(4, 32)).logits


print("peft", peft.__version__, "torch", torch.__version__)
missed = {}
for size in (1e-4, 1e-3):
    model = adapted(torch.float32, size)
    wanted = logits(model)
    with model.disable_adapter():
        effect = (wanted - logits(model)).norm()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = adapted(dtype, size)
        before = {name: weight.clone() for name, weight in model.named_parameters() if "base_layer.weight" in name}
        model.merge_adapter()
        after = {name: weight for name, weight in model.named_parameters() if name in before}
        still = sum(int((after[name] == before[name]).sum()) for name in before) / sum(w.numel() for w in before.values())
        missed[size, dtype] = float((logits(model.unload().float()) - wanted).norm() / effect)
        lost = missed[size, dtype]
        print(f"B ~ {size:g}, merged in {dtype}: {still:.0%} of the weights unmoved, {lost:.0%} of the effect missed")
assert missed[1e-4, torch.bfloat16] > 0.5
assert missed[1e-4, torch.float16] < 0.25
assert missed[1e-4, torch.float32] < 0.01
assert missed[1e-3, torch.bfloat16] < missed[1e-4, torch.bfloat16]
PY
