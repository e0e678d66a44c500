# %% [markdown]
# # GRPO after a short SFT: a base model learns to reason in a format
#
# Supervised fine-tuning on a few worked examples teaches the format, GRPO then teaches the arithmetic. One LoRA
# adapter goes through both stages, and through every rollout of the second one: the engine is built when the model is
# loaded, and gets the adapter as it is at that step.
#
# One GPU of 80 GB for the defaults below; a smaller `MODEL` needs less.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm] @ git+https://github.com/trlpatch/trlpatch"

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
MODEL = "Qwen/Qwen2.5-7B"
DATASET = "openai/gsm8k"
OUT = "grpo-reasoning"
MAX_SEQ_LENGTH = 1024
MAX_COMPLETION_LENGTH = 512
RANK = 32
SFT_EXAMPLES = 100
SFT_EPOCHS = 2
STEPS = 250
GENERATIONS = 8
LEARNING_RATE = 5e-6
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine
#
# `PatchFastRL` comes first: it patches TRL's trainers as they are imported.

# %%
from trlpatch import FastLanguageModel, PatchFastRL

PatchFastRL("GRPO", FastLanguageModel)

# %%
import re

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trlpatch import vLLMSamplingParams

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_SEQ_LENGTH,
    load_in_4bit=False,
    fast_inference=True,
    max_lora_rank=RANK,
    gpu_memory_utilization=0.6,
    **ENGINE,
)

# %%
model = FastLanguageModel.get_peft_model(
    model,
    r=RANK,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=RANK * 2,
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

# %% [markdown]
# ## A chat template of our own
#
# A base model has none that it was trained with. The template ends every prompt inside the reasoning, so that the
# model starts there.

# %%
THINK, ANSWER, END = "<thinking>", "<answer>", "</answer>"
SYSTEM = f"Solve the problem. Think between {THINK} and </thinking>, then give the number between {ANSWER} and {END}."

tokenizer.chat_template = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + THINK + "{% endif %}"
)

# %% [markdown]
# ## Data
#
# GSM8K's answers are a derivation, `####`, and the number.


# %%
def conversation(row):
    reasoning, _, number = row["answer"].partition("####")
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
    worked = f"{THINK}{reasoning.strip()}</thinking>{ANSWER}{number.strip()}{END}"
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": worked}], tokenize=False)
    return {"prompt": prompt, "answer": number.strip(), "text": text}


dataset = load_dataset(DATASET, "main", split="train").map(conversation)
longest = MAX_SEQ_LENGTH - MAX_COMPLETION_LENGTH
dataset = dataset.filter(lambda row: len(tokenizer(row["text"]).input_ids) <= longest)
print(dataset[0]["text"])

# %% [markdown]
# ## Stage 1: SFT for the format

# %%
sft = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset.select(range(min(SFT_EXAMPLES, len(dataset)))).select_columns(["text"]),
    args=SFTConfig(
        output_dir=f"{OUT}/sft",
        dataset_text_field="text",
        per_device_train_batch_size=4,
        num_train_epochs=SFT_EPOCHS,
        learning_rate=2e-4,
        warmup_steps=5,
        logging_steps=5,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
)
sft.train()

# %% [markdown]
# The engine has the adapter of this moment: no copy, no export.

# %%
greedy = vLLMSamplingParams(temperature=0.0, max_tokens=MAX_COMPLETION_LENGTH)
question = tokenizer.apply_chat_template(dataset[0]["prompt"], tokenize=False, add_generation_prompt=True)
print(model.fast_generate([question], sampling_params=greedy)[0].outputs[0].text)

# %% [markdown]
# ## Rewards

# %%
FORMAT = re.compile(r"</thinking>\s*<answer>(.+?)</answer>\s*$", re.DOTALL)


def said(completion):
    """The text between the answer's tags, or None."""
    found = FORMAT.search(completion[0]["content"])
    return found and found[1].strip()


def format_reward(completions, **_):
    """3 for the whole format."""
    return [0.0 if said(completion) is None else 3.0 for completion in completions]


def tags_reward(completions, **_):
    """Half a point for each tag that is there once, less for each that is repeated; long texts cost a little."""
    rewards = []
    for (message,) in completions:
        counts = [message["content"].count(tag) for tag in ("</thinking>", ANSWER, END)]
        rewards.append(sum(0.5 if n == 1 else -0.5 * (n > 1) for n in counts) - len(message["content"]) / 4000)
    return rewards


def correct_reward(completions, answer, **_):
    """5 for the right number, part of it for one that is near."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        try:
            ratio = float(said(completion).replace(",", "")) / float(right.replace(",", ""))
        except (AttributeError, ValueError, ZeroDivisionError):
            rewards.append(-0.5)
        else:
            rewards.append(5.0 if ratio == 1 else 1.5 if 0.9 < ratio < 1.1 else -1.0)
    return rewards


# %% [markdown]
# ## Stage 2: GRPO
#
# `vllm_sampling_params` is what the engine samples with where TRL has no field.

# %%
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[format_reward, tags_reward, correct_reward],
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=OUT,
        vllm_sampling_params=vLLMSamplingParams(stop=[tokenizer.eos_token], include_stop_str_in_output=True),
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        weight_decay=0.001,
        warmup_steps=10,
        lr_scheduler_type="linear",
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
# ## Save, load, compare

# %%
model.save_lora(f"{OUT}/lora")

# %% [markdown]
# The base model, the adapter in memory, and the adapter from its files:

# %%
adapters = {"base model": None, "live adapter": model.load_lora(), "saved adapter": model.load_lora(f"{OUT}/lora")}
answers = {}
for name, adapter in adapters.items():
    (output,) = model.fast_generate([question], sampling_params=greedy, lora_request=adapter)
    answers[name] = output.outputs[0].text
    print(f"--- {name}: {answers[name][:300]}")
