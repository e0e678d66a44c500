# %% [markdown]
# # GRPO with several reward functions
#
# An instruct model learns to answer in XML and to be right. Five small reward functions, each logged by name. At the
# end the adapter is merged into the model and saved for other programs.
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
DATASET = "openai/gsm8k"
OUT = "grpo-rewards"
MAX_SEQ_LENGTH = 1024
MAX_COMPLETION_LENGTH = 512
RANK = 32
STEPS = 250
GENERATIONS = 8
LEARNING_RATE = 5e-6
GGUF = False  # True: for llama.cpp as well, with pip install "trlpatch[gguf]"
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine
#
# `from_pretrained` patches TRL, too, as `PatchFastRL()` does by hand: TRL is imported after it.

# %%
from trlpatch import FastLanguageModel

# %%
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_SEQ_LENGTH,
    load_in_4bit=False,
    fast_inference=True,
    max_lora_rank=RANK,
    gpu_memory_utilization=0.6,
    **ENGINE,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=RANK,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=RANK,
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

# %% [markdown]
# ## Data

# %%
import re

import torch
from datasets import load_dataset

SYSTEM = "Answer in this format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"


def conversation(row):
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
        "answer": row["answer"].partition("####")[2].strip(),
    }


dataset = load_dataset(DATASET, "main", split="train").map(conversation)

# %% [markdown]
# ## Rewards
#
# A reward function gets `completions` and every column of the data set by name, and returns a number for each
# completion.

# %%
STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL)
LOOSE = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)


def texts(completions):
    return [message["content"] for (message,) in completions]


def answer_in(text):
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def correct_reward(completions, answer, **_):
    return [2.0 if answer_in(text) == right else 0.0 for text, right in zip(texts(completions), answer, strict=True)]


def number_reward(completions, **_):
    return [0.5 if answer_in(text).isdigit() else 0.0 for text in texts(completions)]


def strict_format_reward(completions, **_):
    return [0.5 if STRICT.fullmatch(text) else 0.0 for text in texts(completions)]


def loose_format_reward(completions, **_):
    return [0.5 if LOOSE.search(text) else 0.0 for text in texts(completions)]


def tag_reward(completions, **_):
    """An eighth for each tag, and a little less for every character after the last one."""
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    return [
        sum(0.125 * (text.count(tag) == 1) for tag in tags) - 0.001 * len(text.rpartition("</answer>")[2])
        for text in texts(completions)
    ]


# %% [markdown]
# ## Train

# %%
from trl import GRPOConfig, GRPOTrainer

trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[tag_reward, loose_format_reward, strict_format_reward, number_reward, correct_reward],
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=OUT,
        learning_rate=LEARNING_RATE,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        max_grad_norm=0.1,
        per_device_train_batch_size=GENERATIONS,
        gradient_accumulation_steps=1,
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
# ## Try it

# %%
from trlpatch import vLLMSamplingParams

question = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "How many days are in three weeks?"}]
prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
sampling = vLLMSamplingParams(temperature=0.8, top_p=0.95, max_tokens=MAX_COMPLETION_LENGTH)
print(model.fast_generate([prompt], sampling_params=sampling)[0].outputs[0].text)

# %% [markdown]
# ## Save
#
# The adapter alone, for PEFT and for `model.load_lora`:

# %%
model.save_lora(f"{OUT}/lora")

# %% [markdown]
# The whole model, with the adapter merged, for transformers, vLLM and others:

# %%
model.save_pretrained_merged(f"{OUT}/merged", tokenizer, save_method="merged_16bit")

# %% [markdown]
# One file for llama.cpp and Ollama:

# %%
if GGUF:
    model.save_pretrained_gguf(f"{OUT}/gguf", tokenizer, quantization_method="q4_k_m")
