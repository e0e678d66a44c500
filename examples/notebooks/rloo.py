# %% [markdown]
# # RLOO
#
# The same model, engine and rewards as with GRPO, another trainer: each completion is compared with the mean of the
# others of its prompt.
#
# Needs TRL 0.22 or newer. One GPU of 80 GB for the defaults below; a smaller `MODEL` needs less.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm] @ git+https://github.com/trlpatch/trlpatch"

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
MODEL = "Qwen/Qwen2.5-7B-Instruct"
OUT = "rloo"
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
# `from_pretrained` patches TRL, too, as `PatchFastRL()` does by hand: TRL is imported after it.

# %%
import torch
from datasets import Dataset

from trlpatch import FastLanguageModel, vLLMSamplingParams

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_SEQ_LENGTH,
    load_in_4bit=False,
    fast_inference=True,
    max_lora_rank=RANK,
    gpu_memory_utilization=0.6,
    **ENGINE,
)
model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK)

# %% [markdown]
# ## Data and reward: few different letters
#
# A lipogram game: the fewer different letters a text has, the better.

# %%
ANIMALS = ["cat", "owl", "bear", "snail", "whale", "zebra", "lizard", "beetle"]
dataset = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": f"Describe the {animal} in a sentence."}] for animal in ANIMALS * 20]}
)


def few_letters_reward(completions, **_):
    texts = [message["content"].lower() for (message,) in completions]
    return [1.0 - len({letter for letter in text if letter.isalpha()}) / 26 for text in texts]


def length_reward(completions, **_):
    return [min(1.0, len(message["content"]) / 80) for (message,) in completions]


# %% [markdown]
# ## Train

# %%
from trl import RLOOConfig, RLOOTrainer

trainer = RLOOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[few_letters_reward, length_reward],
    train_dataset=dataset,
    args=RLOOConfig(
        output_dir=OUT,
        vllm_sampling_params=vLLMSamplingParams(stop=[tokenizer.eos_token], include_stop_str_in_output=True),
        learning_rate=LEARNING_RATE,
        beta=0.01,
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
