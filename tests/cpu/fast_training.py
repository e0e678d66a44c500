"""Train as the README's first example does, but for `PatchFastRL()`, which loading the model makes up for.

In a process of its own: `python -m tests.cpu.fast_training OUT.json`.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cpu.training import Recorder, count_engines, engine_of, logged, odd_tokens
from trlpatch import FastLanguageModel, vLLMSamplingParams

STEPS = 10
MIN_P = 0.001  # small enough not to change what the witness measures


def run(directory: Path) -> dict[str, Any]:
    built = count_engines()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny.checkpoint(directory / "model")),
        max_seq_length=256,
        load_in_4bit=False,
        fast_inference=True,
        gpu_memory_utilization=0.6,
        max_lora_rank=64,
        enforce_eager=True,
    )
    from trl import GRPOConfig, GRPOTrainer  # patched: the model was loaded with an engine

    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=odd_tokens,
        args=GRPOConfig(
            output_dir=str(directory / "out"),
            max_steps=STEPS,
            learning_rate=1.5e-2,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=16,
            vllm_sampling_params=vLLMSamplingParams(min_p=MIN_P),
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=tiny.dataset(32),
    )
    recorder = Recording(trainer, model.vllm_engine)
    trainer.train()
    recorder.close()
    return {
        "engines_built": len(built),
        "uses_ours": engine_of(trainer) is model.vllm_engine,
        "rollouts": recorder.rollouts,
        "min_p": recorder.min_p,
        "rewards": logged(trainer, "reward"),
    }


class Recording(Recorder):
    """Notes the sampling parameter of the example, too."""

    def __init__(self, trainer: Any, engine: Any) -> None:
        super().__init__(trainer, engine)
        self.min_p: list[float] = []

    def __call__(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        self.min_p.append(sampling_params.min_p)
        return super().__call__(prompts, sampling_params, **kwargs)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        Path(sys.argv[1]).write_text(json.dumps(run(Path(scratch)), indent=1))
