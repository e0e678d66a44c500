# %% [markdown]
# # GRPO with full fine-tuning
#
# All weights are trained, there is no adapter. They are written into the engine before a rollout: the engine that
# the model was loaded with, which sleeps while the optimizer works.
#
# One GPU of 80 GB for the defaults below: weights, gradients and two moments of Adam are 16 bytes per parameter.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm] @ git+https://github.com/trlpatch/trlpatch"

# %% [markdown]
# ## Parameters
#
# `FAST_INFERENCE = False` lets transformers generate. A vLLM on a CPU below 0.25 needs that: it takes no weights in.

# %% tags=["parameters"]
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
OUT = "full-finetuning"
MAX_SEQ_LENGTH = 512
MAX_COMPLETION_LENGTH = 64
STEPS = 100
GENERATIONS = 8
LEARNING_RATE = 1e-6
FAST_INFERENCE = True
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine
#
# `share_weights=False`: the optimizer writes into the trainer's weights while the engine has its own.

# %%
from trlpatch import FastLanguageModel, PatchFastRL

PatchFastRL("GRPO", FastLanguageModel)

# %%
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_SEQ_LENGTH,
    load_in_4bit=False,
    fast_inference=FAST_INFERENCE,
    share_weights=False,
    gpu_memory_utilization=0.3,
    use_gradient_checkpointing=False,
    **ENGINE,
)
print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained")

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

# %%
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=short_reward,
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=OUT,
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
#
# The whole model, for transformers and vLLM.

# %%
trainer.save_model(f"{OUT}/model")
tokenizer.save_pretrained(f"{OUT}/model")
