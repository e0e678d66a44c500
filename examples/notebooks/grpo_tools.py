# %% [markdown]
# # GRPO with a tool
#
# The model may call a calculator. TRL runs the tool, appends its answer, and rolls out again until the model answers
# or has used its turns. Every turn has the adapter of that step.
#
# Needs TRL 0.26 or newer and transformers 5. One GPU of 80 GB for the defaults below; a smaller `MODEL` needs less.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm] @ git+https://github.com/trlpatch/trlpatch" jmespath

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
MODEL = "Qwen/Qwen3-8B"
OUT = "grpo-tools"
MAX_SEQ_LENGTH = 2048
MAX_COMPLETION_LENGTH = 1024  # all turns together, with what the tool answers
TURNS = 3
RANK = 32
STEPS = 100
GENERATIONS = 8
LEARNING_RATE = 1e-5
REGEX = None  # a regular expression for every turn, for models that never call a tool
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine

# %%
from trlpatch import FastLanguageModel, PatchFastRL

PatchFastRL("GRPO", FastLanguageModel)

# %%
import random

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

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
# ## The tool
#
# A function with types and a docstring: the chat template describes it to the model.

# %%
calls = []


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    calls.append((a, b))
    return a * b


# %% [markdown]
# ## Data and rewards

# %%
dice = random.Random(0)
pairs = [(dice.randrange(12, 100), dice.randrange(12, 100)) for _ in range(400)]
dataset = Dataset.from_dict(
    {
        "prompt": [
            [{"role": "user", "content": f"How much is {a} times {b}? End with the number."}] for a, b in pairs
        ],
        "answer": [a * b for a, b in pairs],
    }
)


def correct_reward(completions, answer, **_):
    """1 for an answer that ends with the number."""
    last = [completion[-1].get("content") or "" for completion in completions]
    return [float(text.strip(" .*").endswith(str(right))) for text, right in zip(last, answer, strict=True)]


def brief_reward(completion_ids, **_):
    """A tenth of a point for what is left of the length."""
    return [0.1 - 0.1 * len(ids) / MAX_COMPLETION_LENGTH for ids in completion_ids]


def tool_reward(completions, answer, **_):
    """Up to half a point for the answer of the tool that is nearest to the right one."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        said = [message["content"] for message in completion if message["role"] == "tool"]
        numbers = [int(text) for text in said if text.isdigit()]
        rewards.append(0.5 * max((min(n, right) / max(n, right) for n in numbers), default=0.0))
    return rewards


# %% [markdown]
# ## Train

# %%
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[correct_reward, tool_reward, brief_reward],
    train_dataset=dataset,
    tools=[multiply],
    args=GRPOConfig(
        output_dir=OUT,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=MAX_COMPLETION_LENGTH,
        max_tool_calling_iterations=TURNS,
        # A regular expression masks the distribution, which TRL's correction would take for another policy.
        vllm_structured_outputs_regex=REGEX,
        vllm_importance_sampling_correction=REGEX is None,
        chat_template_kwargs={"enable_thinking": False},
        max_steps=STEPS,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()

# %%
print(f"{len(calls)} calls, the last ones: {calls[-3:]}")

# %% [markdown]
# ## Save

# %%
model.save_lora(f"{OUT}/lora")
