# %% [markdown]
# # GRPO in 4 bits
#
# QLoRA: the base weights are quantized with bitsandbytes (nf4) in the engine and in the trainer, a copy each; the
# adapter is trained in 16 bits, and the engine gets it as it is at that step.
#
# Needs an NVIDIA GPU; 24 GB are enough for the defaults below.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm,4bit] @ git+https://github.com/trlpatch/trlpatch"

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
MODEL = "Qwen/Qwen2.5-7B-Instruct"
OUT = "grpo-4bit"
MAX_SEQ_LENGTH = 512
MAX_COMPLETION_LENGTH = 128
RANK = 16
STEPS = 100
GENERATIONS = 8
LEARNING_RATE = 1e-5
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine
#
# `load_in_4bit=True` is the default. `from_pretrained` patches TRL, too, as `PatchFastRL()` does by hand: TRL is
# imported after it.

# %%
import torch
from datasets import Dataset

from trlpatch import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_SEQ_LENGTH,
    load_in_4bit=True,
    fast_inference=True,
    max_lora_rank=RANK,
    gpu_memory_utilization=0.5,
    **ENGINE,
)
model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK)

# %% [markdown]
# ## Data and reward

# %%
THINGS = ["red", "cold", "loud", "very old", "smaller than a coin", "found in a kitchen", "alive", "made of wood"]
dataset = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": f"Name something that is {thing}."}] for thing in THINGS * 8]}
)


def short_reward(completions, **_):
    return [-abs(len(message["content"]) - 40) / 40 for (message,) in completions]


# %% [markdown]
# ## Train
#
# Optimizer states in 8 bits, too.

# %%
from trl import GRPOConfig, GRPOTrainer

trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=short_reward,
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=OUT,
        optim="paged_adamw_8bit",
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=MAX_COMPLETION_LENGTH,
        max_steps=STEPS,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()

# %% [markdown]
# ## Save

# %%
model.save_lora(f"{OUT}/lora")
