#!/usr/bin/env bash
# TRL: disable_dropout leaves the attention's dropout on
#
# One would guess: `GRPOConfig(disable_dropout=True)` makes two forward passes over the same tokens agree, so the
#   importance ratio is exactly 1 before the first update.
# What happens: it sets p=0 on modules of class nn.Dropout. Qwen2, Llama, Mistral and others have none: they hold
#   attention_dropout as a number and pass it to the attention function in training mode. With a checkpoint whose
#   config says attention_dropout=0.1, log-probabilities differ from pass to pass.
# Source: trl/trainer/utils.py, disable_dropout_in_model; transformers/models/qwen2/modeling_qwen2.py,
#   Qwen2Attention.forward
# Versions: trl 1.16.0, transformers 5.23.0, torch 2.13.0. 2026-11-27.
# Seen:
#   trl 1.16.0 transformers 5.23.0 torch 2.13.0+cpu
#   GPT2, dropout 0.1 in modules: two passes differ by 0.0000
#   Qwen2, attention_dropout=0.1: two passes differ by 0.1084
#   Llama, attention_dropout=0.1: two passes differ by 0.0928
#   Qwen2, attention_dropout=0.0: two passes differ by 0.0000
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.1.0 requests==2.34.2 trl==1.16.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from trl.trainer.utils import disable_dropout_in_model

torch.manual_seed(0)
tokens = torch.randint(0, 64, (2, 16))
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def gap(config):
    """Return the largest difference between the log-probabilities of two passes in training mode."""
    model = AutoModelForCausalLM.from_config(config).train()
    disable_dropout_in_model(model)
    with torch.no_grad():
        one, two = (model(tokens).logits.log_softmax(-1) for _ in range(2))
    return float((one - two).abs().max())


print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
gaps = {
    "GPT2, dropout 0.1 in modules": gap(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    "Qwen2, attention_dropout=0.1": gap(Qwen2Config(attention_dropout=0.1, num_key_value_heads=2, **shape)),
    "Llama, attention_dropout=0.1": gap(LlamaConfig(attention_dropout=0.1, num_key_value_heads=2, **shape)),
    "Qwen2, attention_dropout=0.0": gap(Qwen2Config(num_key_value_heads=2, **shape)),
}
for label, found in gaps.items():
    print(f"{label}: two passes differ by {found:.4f}")
assert gaps["GPT2, dropout 0.1 in modules"] == gaps["Qwen2, attention_dropout=0.0"] == 0
assert gaps["Qwen2, attention_dropout=0.1"] > 0.01 and gaps["Llama, attention_dropout=0.1"] > 0.01
PY
