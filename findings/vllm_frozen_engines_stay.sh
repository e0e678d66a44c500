#!/usr/bin/env bash
# A vLLM engine in the trainer's process is not freed by `del llm; gc.collect()`
#
# One would guess: with VLLM_ENABLE_V1_MULTIPROCESSING=0 an engine is objects of this process; without references, and after
#   a collection, its weights and its KV cache are gone, as in every notebook that runs a cell again.
# What happens: at the end of building one vLLM calls gc.freeze(), so that collections pass over what there is; an engine is
#   full of cycles, and stays, with all its memory. Each further one adds its own. gc.unfreeze() and a collection free them
#   all; vLLM calls it only in EngineCore.shutdown(), which deleting an LLM does not.
# Source: vllm/utils/gc_utils.py, freeze_gc_heap; vllm/v1/engine/core.py, EngineCore.__init__ and shutdown
# Versions: vLLM 0.28.0 (CPU backend), torch 2.13.0, transformers 5.23.0. 2026-11-28.
# Seen:
#   engine 0, deleted and collected: its model is there, 1131 MiB more than before the first
#   engine 1, deleted and collected: its model is there, 2162 MiB more than before the first
#   engine 2, deleted and collected: its model is there, 3192 MiB more than before the first
#   after gc.unfreeze(): the last model is gone, 3072 MiB less
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
. "$root/findings/vllm_cpu.bash" "$root" "$work"

"$work/venv/bin/python" - "$work" <<'PY'
import gc
import sys
import weakref
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import vllm
from vllm import LLM

work = Path(sys.argv[1])
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
Qwen2ForCausalLM(Qwen2Config(vocab_size=256, max_position_embeddings=512, **shape)).save_pretrained(work / "model")


def resident():
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20


print(f"vLLM {vllm.__version__}, torch {torch.__version__}")
sizes = [resident()]
for number in range(3):
    llm = LLM(str(work / "model"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512)
    model = weakref.ref(llm.llm_engine.model_executor.driver_worker.model_runner.model)
    del llm
    gc.collect()
    gc.collect()
    sizes.append(resident())
    print(f"engine {number}, deleted and collected: its model is {'there' if model() else 'gone'}, {sizes[-1] - sizes[0]} MiB more than before the first")
gc.unfreeze()
gc.collect()
gc.collect()
freed = sizes[-1] - resident()
print(f"after gc.unfreeze(): the last model is {'there' if model() else 'gone'}, {freed} MiB less")
assert sizes[3] - sizes[1] > 1500 and freed > 2000 and model() is None
PY
