# %% [markdown]
# # GRPO: interrupt and resume
#
# Checkpoints hold the adapter, the optimizer and the state of the trainer. After a restart a new model with a new
# adapter is loaded, and `resume_from_checkpoint` puts the saved one in: the first rollout after that has it.
#
# One GPU of 80 GB for the defaults below; a smaller `MODEL` needs less.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm] @ git+https://github.com/trlpatch/trlpatch"

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
MODEL = "Qwen/Qwen2.5-7B-Instruct"
OUT = "grpo-resume"
MAX_SEQ_LENGTH = 512
MAX_COMPLETION_LENGTH = 64
RANK = 16
STEPS = 100
SAVE_EVERY = 50
GENERATIONS = 8
LEARNING_RATE = 1e-4
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model, engine, adapter
#
# `from_pretrained` patches TRL, too, as `PatchFastRL()` does by hand: TRL is imported after it.

# %%
import torch
from datasets import Dataset

from trlpatch import FastLanguageModel

base, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_SEQ_LENGTH,
    load_in_4bit=False,
    fast_inference=True,
    max_lora_rank=RANK,
    gpu_memory_utilization=0.6,
    **ENGINE,
)
model = FastLanguageModel.get_peft_model(base, r=RANK, lora_alpha=RANK)

# %% [markdown]
# ## A task: short answers

# %%
THINGS = ["red", "cold", "loud", "very old", "smaller than a coin", "found in a kitchen", "alive", "made of wood"]
dataset = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": f"Name something that is {thing}."}] for thing in THINGS * 8]}
)


def short_reward(completions, **_):
    return [-abs(len(message["content"]) - 40) / 40 for (message,) in completions]


# %%
from trl import GRPOConfig, GRPOTrainer


def build_trainer(model, steps):
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=short_reward,
        train_dataset=dataset,
        args=GRPOConfig(
            output_dir=OUT,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=MAX_COMPLETION_LENGTH,
            max_steps=steps,
            save_steps=SAVE_EVERY,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
    )


# %% [markdown]
# ## The first run
#
# It stops at half of the steps, as a notebook does whose time is up.

# %%
trainer = build_trainer(model, STEPS // 2)
trainer.train()
first_run = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]

# %% [markdown]
# ## The second run
#
# A fresh adapter stands for a fresh process. The base model and its engine stay, since a second engine would not fit
# beside the first.

# %%
model = FastLanguageModel.get_peft_model(model.unload(), r=RANK, lora_alpha=RANK)
trainer = build_trainer(model, STEPS)
trainer.train(resume_from_checkpoint=True)

# %% [markdown]
# The log of the first run is part of the checkpoint, so that this is the whole curve:

# %%
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"{len(rewards)} steps, {len(first_run)} of them before the restart")

# %% [markdown]
# ## Save

# %%
model.save_lora(f"{OUT}/lora")
