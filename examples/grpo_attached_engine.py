"""GRPO with LoRA on a vLLM engine that this script builds and owns.

python examples/grpo_attached_engine.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 50
"""

import argparse
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vllm is imported: the worker lives in this process

from trlpatch import PatchFastRL, attach_engine

print(PatchFastRL("GRPO"))

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from vllm import LLM

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
    parser.add_argument("--out", default="out")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    dtype = "bfloat16" if gpu else "float32"

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    engine = LLM(
        model=arguments.model,
        dtype=dtype,
        enable_lora=True,
        max_lora_rank=RANK,
        enable_sleep_mode=gpu,
        gpu_memory_utilization=0.4,
        max_model_len=512,
        logprobs_mode="processed_logprobs",  # what TRL's importance sampling compares with
    )
    attach_engine(model, engine)

    GRPOTrainer(
        model=model,
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
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    ).train()


if __name__ == "__main__":
    main()
