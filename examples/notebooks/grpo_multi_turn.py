# %% [markdown]
# # GRPO with rollouts of several turns
#
# The model plays a game: guess a number from 1 to 100. After each guess the environment says "higher" or "lower". The
# loop is a `rollout_func` that drives the trainer's engine itself; what it generates has the adapter being trained.
#
# Needs TRL 0.28 or newer, where `env_mask` keeps the environment's words out of the loss. One GPU of 80 GB for the
# defaults below; a smaller `MODEL` needs less.

# %% [markdown]
# ## Install

# %%
# %pip install -q "trlpatch[demo,vllm] @ git+https://github.com/trlpatch/trlpatch"

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
MODEL = "Qwen/Qwen2.5-7B-Instruct"
OUT = "grpo-multi-turn"
MAX_SEQ_LENGTH = 2048
GUESS_LENGTH = 32  # tokens of one guess
TURNS = 7
RANK = 32
STEPS = 100
GENERATIONS = 8
LEARNING_RATE = 1e-5
ENGINE = {}  # further arguments of vllm.LLM

# %% [markdown]
# ## Model and engine

# %%
from trlpatch import FastLanguageModel, PatchFastRL

PatchFastRL("GRPO", FastLanguageModel)

# %%
import random
import re

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

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
model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK)

# %% [markdown]
# ## The environment

# %%
NUMBER = re.compile(r"\d+")


class GuessingGame:
    """One secret number; `step` answers a guess with what to say next, and None when the game is over."""

    def __init__(self, secret):
        self.secret = secret
        self.distance = 100
        self.turns = 0

    def step(self, text):
        self.turns += 1
        guess = NUMBER.search(text)
        if guess is None:
            return "That is no number."
        self.distance = min(self.distance, abs(int(guess[0]) - self.secret))
        if self.distance == 0:
            return None
        return "Higher." if int(guess[0]) < self.secret else "Lower."


# %% [markdown]
# ## The rollouts
#
# All games of a batch take their turns together, since an engine likes batches. Each keeps one list of ids: the
# model's tokens have 1 in the mask and their log-probabilities, the environment's have 0.

# %%
QUESTION = "I think of a number from 1 to 100. Guess it, with one number per turn."


def words_of_environment(text):
    """The ids that come between the end of one guess and the start of the next."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "X"}]
    before = tokenizer.apply_chat_template(turns, tokenize=False)
    turns.append({"role": "user", "content": text})
    after = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(after[len(before.rstrip()) :], add_special_tokens=False).input_ids


def play(prompts, trainer):
    engine = trainer.vllm_generation.llm
    sampling = vLLMSamplingParams(temperature=1.0, max_tokens=GUESS_LENGTH, logprobs=0)
    games = [GuessingGame(random.Random(prompt[-1]["content"]).randint(1, 100)) for prompt in prompts]
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    starts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    found = [{"ids": [], "mask": [], "logprobs": []} for _ in prompts]
    open_games = list(range(len(games)))
    for turn in range(TURNS):
        asked = [{"prompt_token_ids": starts[i] + found[i]["ids"]} for i in open_games]
        outputs = engine.generate(asked, sampling, use_tqdm=False)
        still_open = []
        for i, output in zip(open_games, outputs, strict=True):
            (guess,) = output.outputs
            ids = list(guess.token_ids)
            found[i]["ids"] += ids
            found[i]["mask"] += [1] * len(ids)
            found[i]["logprobs"] += [at[token].logprob for at, token in zip(guess.logprobs, ids, strict=True)]
            reply = games[i].step(guess.text)
            if reply is not None and turn + 1 < TURNS:
                ids = words_of_environment(reply)
                found[i]["ids"] += ids
                found[i]["mask"] += [0] * len(ids)
                found[i]["logprobs"] += [0.0] * len(ids)
                still_open.append(i)
        open_games = still_open
    return {
        "prompt_ids": starts,
        "completion_ids": [one["ids"] for one in found],
        "logprobs": [one["logprobs"] for one in found],
        "env_mask": [one["mask"] for one in found],
        "distance": [float(game.distance) for game in games],
        "turns": [game.turns for game in games],
    }


# %% [markdown]
# ## Data and rewards
#
# What `play` returns beside ids and log-probabilities comes to the reward functions by name. The number in the
# prompt makes each game another one.

# %%
dataset = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": f"Game {number}. {QUESTION}"}] for number in range(1000)]}
)


def near_reward(completions, distance, **_):
    return [1.0 - value / 100 for value in distance]


def fast_reward(completions, distance, turns, **_):
    return [1.0 - used / TURNS if value == 0 else 0.0 for value, used in zip(distance, turns, strict=True)]


def brief_reward(completion_ids, **_):
    return [-0.05 * len(ids) / (TURNS * GUESS_LENGTH) for ids in completion_ids]


# %% [markdown]
# ## Train

# %%
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[near_reward, fast_reward, brief_reward],
    train_dataset=dataset,
    rollout_func=play,
    args=GRPOConfig(
        output_dir=OUT,
        use_vllm=True,
        vllm_mode="colocate",
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=TURNS * GUESS_LENGTH * 2,
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
