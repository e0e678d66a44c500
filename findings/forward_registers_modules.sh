#!/usr/bin/env bash
# A forward pass of a transformers model registers modules
#
# One would guess: modules are registered while a model is built. A global registration hook
#   (register_module_module_registration_hook) that fires later means that the model has changed: a layer was wrapped
#   or an adapter added.
# What happens: it fires once per layer in every forward pass. The decoder loops over a slice, `self.layers[: n]`, and
#   a slice of a ModuleList is a new ModuleList, whose constructor registers each layer again, under the temporary
#   list. The model itself does not change.
# Source: torch/nn/modules/container.py, ModuleList.__getitem__; transformers/models/qwen2/modeling_qwen2.py,
#   Qwen2Model.forward
# Versions: torch 2.13.0, transformers 5.23.0. 2026-11-27.
# Seen:
#   torch 2.13.0+cpu transformers 5.23.0
#   Qwen2ForCausalLM, 6 layers: registrations in three forward passes [6, 6, 6], parents {'ModuleList'}
#   LlamaForCausalLM, 6 layers: registrations in three forward passes [6, 6, 6], parents {'ModuleList'}
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4)
seen = []
register_module_module_registration_hook(lambda parent, name, child: seen.append((type(parent).__name__, parent)))
for config, kind in ((Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)):
    model = kind(config(num_key_value_heads=2, **shape)).eval()
    own = {id(module) for module in model.modules()}
    counts = []
    for _ in range(3):
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
        counts.append(len(seen))
    parents = {name for name, _ in seen}
    print(f"{kind.__name__}, 6 layers: registrations in three forward passes {counts}, parents {parents}")
    assert counts == [6, 6, 6] and parents == {"ModuleList"}
    assert not any(id(parent) in own for _, parent in seen), "the parent is no module of the model"
    assert own == {id(module) for module in model.modules()}
PY
