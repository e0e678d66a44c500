#!/usr/bin/env bash
# PEFT on transformers 5: "all-linear" adapts a MoE model's experts and its router, the experts with twice the rank
#
# One would guess: in transformers 5 the experts are two stacked parameters and the router is a parameter in a module
#   of its own; neither is an nn.Linear. `target_modules="all-linear"` therefore adapts attention only. And a warning
#   that keys of rank_pattern "did not match any targeted module and were ignored" means that they have no effect.
# What happens: PEFT reads the config as if the experts were still single linears, moves them and the router to
#   `target_parameters` of the caller's config object, and gives the fused gate_up_proj the rank 2r through a
#   `rank_pattern` that nobody wrote. The warning names exactly that pattern, which does have its effect. A router
#   under training changes which experts run; who serves the adapter has to know both.
# Source: peft/utils/transformers_weight_conversion.py
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   peft 0.21.2 transformers 5.23.0 torch 2.13.0+cpu
#   nn.Linear in the model: ['lm_head', 'k_proj', 'o_proj', 'q_proj', 'v_proj']
#   adapted: mlp.experts.base_layer.lora_A.default.weight (32, 32)
#   adapted: mlp.experts.lora_A.default.weight (16, 16)
#   adapted: mlp.gate.lora_A.default.weight (4, 32)
#   the caller's config now: target_parameters ['down_proj', 'gate.weight', 'gate_up_proj'] rank_pattern {'.*\\.gate_up_proj': 8}
#   warning: The following rank_pattern keys did not match any targeted module and were ignored: ['.*\\.gate_up_proj'].
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
base = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )
)
linears = sorted(name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear))
config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = get_peft_model(base, config)
ignored = [str(one.message) for one in caught if "did not match any targeted module" in str(one.message)]
shapes = {
    name.removeprefix("base_model.model.model.layers.0."): tuple(parameter.shape)
    for name, parameter in model.named_parameters()
    if "lora_A" in name
}
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("nn.Linear in the model:", [name.rpartition(".")[2] for name in linears])
for name, shape in shapes.items():
    if "mlp" in name:
        print("adapted:", name, shape)
print("the caller's config now: target_parameters", sorted(config.target_parameters), "rank_pattern", config.rank_pattern)
print("warning:", ignored[0])
assert not any("mlp" in name for name in linears)
assert shapes["mlp.gate.lora_A.default.weight"][0] == 4
# Four experts: rank 8 for gate_up_proj, rank 4 for down_proj.
experts = {shape[0] for name, shape in shapes.items() if "mlp.experts" in name}
assert experts == {4 * 8, 4 * 4}, experts
assert config.rank_pattern and "gate_up_proj" in ignored[0]
PY
