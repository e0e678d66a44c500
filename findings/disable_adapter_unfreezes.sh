#!/usr/bin/env bash
# PEFT: `with model.disable_adapter()` leaves a frozen adapter trainable
#
# One would guess: the context manager puts back what it found. An adapter that was frozen (for evaluation, as a
#   reference policy, or because another adapter is being trained) is frozen afterwards, too.
# What happens: leaving the context activates the adapter, and activating makes its parameters trainable, whatever
#   `requires_grad` was. So an optimizer or a count of trainable parameters made after a reference forward pass sees an
#   adapter that was frozen on purpose. Loaded with is_trainable=False it is the same.
# Source: peft/tuners/tuners_utils.py, BaseTunerLayer.enable_adapters: self.set_adapter(self.active_adapters)
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   peft 0.21.2 torch 2.13.0+cpu
#   frozen by requires_grad_(False): trainable tensors before, within, after: (0, 0, 8)
#   loaded with is_trainable=False: trainable tensors before, within, after: (0, 0, 8)
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - "$work" <<'PY'
import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM


def base():
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **shape))


def trainable(model):
    return sum(parameter.requires_grad for parameter in model.parameters())


def around_a_reference_pass(model):
    """Return how many tensors are trainable before, within and after the context."""
    before = trainable(model)
    with torch.no_grad(), model.disable_adapter():
        model(torch.tensor([[1, 2, 3]]))
        within = trainable(model)
    return before, within, trainable(model)


by_hand = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
by_hand.save_pretrained(sys.argv[1] + "/adapter")
by_hand.requires_grad_(False)
loaded = PeftModel.from_pretrained(base(), sys.argv[1] + "/adapter", is_trainable=False)
print("peft", peft.__version__, "torch", torch.__version__)
for label, model in (("frozen by requires_grad_(False)", by_hand), ("loaded with is_trainable=False", loaded)):
    counts = around_a_reference_pass(model)
    print(f"{label}: trainable tensors before, within, after: {counts}")
    assert counts == (0, 0, 8)
PY
