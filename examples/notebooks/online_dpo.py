# %% [markdown]
# # Online DPO
#
# Two completions of each prompt are sampled from the policy, a reward says which is better, and DPO learns from the
# pair. The reward here is a rule, so that the notebook needs one model only.
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
OUT = "online-dpo"
MAX_SEQ_LENGTH = 512
MAX_COMPLETION_LENGTH = 64
RANK = 16
STEPS = 100
BATCH = 8
LEARNING_RATE = 1e-5
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine
#
# `from_pretrained` patches TRL, too, as `PatchFastRL()` does by hand: TRL is imported after it.

# %%
import torch
from datasets import Dataset

from trlpatch import FastLanguageModel

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
# ## Data and preference: plain words
#
# Short words are better than long ones.

# %%
TOPICS = ["inflation", "photosynthesis", "gravity", "insurance", "democracy", "evolution", "vaccines", "tides"]
dataset = Dataset.from_dict({"prompt": [f"Explain {topic} to a child:" for topic in TOPICS * 20]})


def plain_words(completions, **_):
    return [-sum(map(len, text.split())) / max(1, len(text.split())) for text in completions]


# %% [markdown]
# TRL moved the trainer in 0.26, and takes reward functions here from 0.23 on; before, it asks a judge for the better
# one of each pair.

# %%
import inspect

try:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
except ImportError:
    from trl import OnlineDPOConfig, OnlineDPOTrainer

if "reward_funcs" in inspect.signature(OnlineDPOTrainer.__init__).parameters:
    preference = {"reward_funcs": plain_words}
else:
    from trl import BasePairwiseJudge

    class PlainWords(BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True):
            scores = [plain_words(pair) for pair in completions]
            return [0 if first >= second else 1 for first, second in scores]

    preference = {"judge": PlainWords()}

# %% [markdown]
# ## Train

# %%
trainer = OnlineDPOTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=OnlineDPOConfig(
        output_dir=OUT,
        learning_rate=LEARNING_RATE,
        beta=0.1,
        per_device_train_batch_size=BATCH,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        max_length=MAX_SEQ_LENGTH,
        max_steps=STEPS,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
    **preference,
)
trainer.train()

# %% [markdown]
# ## Save

# %%
model.save_lora(f"{OUT}/lora")
