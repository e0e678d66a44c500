"""GRPO with LoRA on FastLanguageModel: one copy of the base weights for trainer and engine.

python examples/grpo_fast.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 50
"""

import argparse

from trlpatch import FastLanguageModel, PatchFastRL

print(PatchFastRL("GRPO"))

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

RANK = 16
PROMPT = "Name something that is {}, in one short sentence."
WORDS = ["red", "cold", "loud", "very old", "smaller than a coin", "found in a kitchen", "alive", "made of wood"]


def short(completions, **_):
    """Reward short answers."""
    return [-abs(len(text.split()) - 5) / 10 for text in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--utilization", type=float, default=0.4, help="the engine's share of the device's memory")
    parser.add_argument("--out", default="out")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()

    model, tokenizer = FastLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=512,
        load_in_4bit=False,
        gpu_memory_utilization=arguments.utilization,
        max_lora_rank=RANK,
    )
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK)

    GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=short,
        args=GRPOConfig(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            learning_rate=1e-4,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=64,
            bf16=gpu,
            use_cpu=not gpu,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT.format(word) for word in WORDS] * arguments.steps}),
    ).train()
    model.save_lora(f"{arguments.out}/adapter")


if __name__ == "__main__":
    main()
