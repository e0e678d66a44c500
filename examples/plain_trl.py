"""Plain TRL: GRPO with LoRA and TRL's own colocated engine. Nothing here knows of trlpatch.

trlpatch run examples/plain_trl.py --model Qwen/Qwen2.5-0.5B-Instruct
trlpatch run accelerate launch examples/plain_trl.py
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


def short(completions, **_):
    """Reward short answers."""
    return [-abs(len(text.split()) - 5) / 10 for text in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="out")
    arguments = parser.parse_args()
    GRPOTrainer(
        model=arguments.model,
        reward_funcs=short,
        args=GRPOConfig(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            learning_rate=1e-4,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=64,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.4,
            vllm_max_model_length=512,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["Name an animal, in one short sentence."] * 8 * arguments.steps}),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()


if __name__ == "__main__":
    main()
