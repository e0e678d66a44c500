"""Two steps of GRPO with what `from_pretrained` gives.

    python -m tests.cpu.loaded_training adapter|full MODEL OUT.json

vLLM's CPU backend repacks linear weights and drops them, so that none can be pushed into it; without oneDNN it keeps
them (0.28: `dispatch_cpu_unquantized_gemm`), and TRL's push is the one that a GPU gets.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # noqa: F401  # sets vLLM's environment

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cpu.fast import SMALL
from tests.cpu.small_grpo import small_grpo
from tests.cpu.training import Recorder, count_engines, engine_of
from trlpatch import FastLanguageModel, PatchFastRL
from trlpatch.engine import probes


def run(case: str, place: str, directory: Path) -> dict[str, Any]:
    PatchFastRL()
    if case == "full":
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False
    built = count_engines()
    wanted = {**SMALL, "full_finetuning": True} if case == "full" else SMALL
    model, tokenizer = FastLanguageModel.from_pretrained(place, **wanted)
    model = FastLanguageModel.for_training(model)
    trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    learning_rate = 1e-3 if case == "full" else 1.5e-2
    trainer = small_grpo(
        model, directory, config={"max_steps": 2, "learning_rate": learning_rate}, processing_class=tokenizer
    )
    recorder = Recorder(trainer, model.vllm_engine)
    trainer.train()
    recorder.close()
    now = dict(model.named_parameters())
    moved = [not one.equal(now[name]) for name, one in trained.items()]
    return {
        "engines_built": len(built),
        "uses_ours": engine_of(trainer) is model.vllm_engine,
        "lora": probes.max_lora_rank(model.vllm_engine),
        "rollouts": recorder.rollouts,
        "trained": sorted({kind for kind in ("lora_A", "lora_B") for name in trained if kind in name}),
        "every_weight": len(trained) == len(now),
        "moved": sum(moved) / len(moved),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        Path(sys.argv[3]).write_text(json.dumps(run(sys.argv[1], sys.argv[2], Path(scratch)), indent=1))
