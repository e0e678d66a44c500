"""The shapes of public RL notebooks: which names, arguments and calls of Unsloth, TRL and vLLM each family uses.

Written anew, cell by cell, with the import line replaced: `from unsloth import X` is `from trlpatch import X`. Three
things that a machine without a GPU lacks are replaced in all: `load_in_4bit = True` by False, "adamw_8bit" by
"adamw_torch", and 16 bits by float32 (CPU_ENGINE, CPU_CONFIG). Steps are few and lengths short.

The layout of their code, `name = value`, is kept, and their habit of importing where a cell needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LINEARS = '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'

LOADED = """
from trlpatch import {imports}
import torch
model, tokenizer = {cls}.from_pretrained(
    model_name = MODEL,
    max_seq_length = 512,
    load_in_4bit = False,
    {load}
)
"""

ADAPTED = """
model = {cls}.get_peft_model(
    model,
    r = 8,
    lora_alpha = 16,
    {adapter}
    random_state = 3407,
)
"""

DATA = """
from datasets import Dataset
dataset = Dataset.from_list([
    {"prompt": [{"role": "user", "content": f"How much is {a} and {a}?"}], "answer": str(2 * a)}
    for a in range(16)
])
"""

REWARDS = """
def length_reward(completions, **kwargs):
    return [len(completion[0]["content"]) / 50 for completion in completions]

def answer_reward(prompts, completions, answer, **kwargs):
    return [float(right in completion[0]["content"]) for completion, right in zip(completions, answer)]
"""

CONFIGURED = """
from trl import {kind}Config, {kind}Trainer
training_args = {kind}Config(
    {config}
    learning_rate = 5e-5,
    weight_decay = 0.001,
    lr_scheduler_type = "linear",
    optim = "adamw_torch",
    logging_steps = 1,
    max_steps = 2,
    save_steps = 2,
    report_to = "none",
    output_dir = "outputs",
    **CPU_CONFIG,
)
"""

TRAINER = """
trainer = {kind}Trainer(
    model = model,
    processing_class = tokenizer,
    reward_funcs = [length_reward, answer_reward],
    args = training_args,
    train_dataset = dataset,
    {trainer}
)
"""

SFT = """
from trl import SFTTrainer, SFTConfig
texts = Dataset.from_dict({
    "text": [tokenizer.apply_chat_template(prompt, tokenize = False) for prompt in dataset["prompt"]]
})
SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = texts,
    args = SFTConfig(
        dataset_text_field = "text",
        per_device_train_batch_size = 2,
        warmup_steps = 1,
        max_steps = 1,
        learning_rate = 2e-4,
        optim = "adamw_torch",
        report_to = "none",
        output_dir = "sft",
        **CPU_CONFIG,
    ),
).train()
"""

LENGTH_FILTER = """
tokenized = dataset.map(
    lambda rows: {
        "tokens": tokenizer.apply_chat_template(rows["prompt"], add_generation_prompt = True, tokenize = True)
    },
    batched = True,
)
lengths = [len(ids) for ids in tokenized["tokens"]]
longest = sorted(lengths)[int(len(lengths) * 0.9)]
dataset = dataset.select([at for at, length in enumerate(lengths) if length <= longest])
assert len(dataset) > 8
"""

SAMPLED = """
from vllm import SamplingParams
vllm_sampling_params = SamplingParams(
    min_p = 0.1,
    top_p = 1.0,
    top_k = -1,
    seed = 3407,
    stop = [tokenizer.eos_token],
    include_stop_str_in_output = True,
)
"""

FAST_GENERATE = """
from vllm import SamplingParams
text = tokenizer.apply_chat_template(dataset[0]["prompt"], tokenize = False, add_generation_prompt = True)
sampling_params = SamplingParams(temperature = 1.0, top_k = 50, max_tokens = 8)
output = model.fast_generate([text], sampling_params = sampling_params, lora_request = None)[0].outputs[0].text
model.save_lora("grpo_lora")
from safetensors import safe_open
with safe_open("grpo_lora/adapter_model.safetensors", framework = "pt") as f:
    assert all(f.get_tensor(key).abs().sum() > 0 for key in f.keys())
output = model.fast_generate(
    [text], sampling_params = sampling_params, lora_request = model.load_lora("grpo_lora"),
)[0].outputs[0].text
"""

GENERATE = """
from transformers import TextStreamer
text = tokenizer.apply_chat_template(dataset[0]["prompt"], add_generation_prompt = True, tokenize = False)
_ = model.generate(
    **tokenizer(text, return_tensors = "pt").to(model.device),
    max_new_tokens = 8, temperature = 1.0, top_p = 0.95, top_k = 64,
    streamer = TextStreamer(tokenizer, skip_prompt = True),
)
model.save_pretrained("lora")
tokenizer.save_pretrained("lora")
"""

MERGED = """
model.save_pretrained_merged("merged", tokenizer, save_method = "merged_16bit")
"""

GGUF = """
model.save_pretrained_gguf("gguf", tokenizer, quantization_method = "q8_0")
"""

OPTIONS = {"lengths": "max_prompt_length = 64,\n    max_completion_length = 16,"}
FAST = "fast_inference = True, max_lora_rank = 8, gpu_memory_utilization = 0.6, **CPU_ENGINE,"
TARGETS = f'target_modules = {LINEARS},\n    use_gradient_checkpointing = "unsloth",'
SWITCHES = """finetune_vision_layers = False, finetune_language_layers = True,
    finetune_attention_modules = True, finetune_mlp_modules = True, lora_dropout = 0, bias = "none","""
ONE_OF_FOUR = "\n    per_device_train_batch_size = 1, gradient_accumulation_steps = 1, num_generations = 4,"
FOUR = "per_device_train_batch_size = 4, num_generations = 4,"


@dataclass(frozen=True)
class Shape:
    """One family of notebooks: what its cells say, and which of the 33 are like it."""

    like: str
    load: str = FAST
    adapter: str = TARGETS
    config: str = f"warmup_ratio = 0.1, {OPTIONS['lengths']} {FOUR}"
    cls: str = "FastLanguageModel"
    imports: str = ""
    kind: str = "GRPO"
    trainer: str = ""
    before: dict[str, str] = field(default_factory=dict)
    rewards: str = REWARDS
    data: str = DATA
    after: dict[str, str] = field(default_factory=lambda: {"generate": FAST_GENERATE})
    since: tuple[int, ...] = (0,)

    def cells(self) -> dict[str, str]:
        """Return the cells in order, each with its name."""
        words = {
            "imports": self.imports or self.cls,
            "cls": self.cls,
            "load": self.load,
            "adapter": self.adapter,
            "kind": self.kind,
            "config": self.config,
            "trainer": self.trainer,
        }
        found = {"load": LOADED.format(**words)}
        if self.adapter:
            found["adapter"] = ADAPTED.format(**words)
        found |= {"data": self.data, **self.before, "rewards": self.rewards}
        found |= {"config": CONFIGURED.format(**words), "trainer": TRAINER.format(**words)}
        return {**found, "train": "trainer.train()\n", **self.after}


SANDBOX = """
from trlpatch import check_python_modules, create_locked_down_function, execute_with_time_limit

@execute_with_time_limit(2)
def played(strategy):
    return strategy([[0] * 4 for _ in range(4)])

def length_reward(completions, **kwargs):
    scores = []
    for completion in completions:
        code = completion[0]["content"]
        ok, info = check_python_modules(code)
        scores.append(len(code) / 50 - (not ok))
    return scores

def answer_reward(completions, **kwargs):
    scores = []
    for completion in completions:
        try:
            scores.append(float(played(create_locked_down_function(completion[0]["content"])) is not None))
        except Exception:
            scores.append(0.0)
    return scores
"""

ROLLOUT = """
def rollout_func(prompts, trainer):
    llm = trainer.vllm_generation.llm if hasattr(trainer, "vllm_generation") else trainer.llm
    from vllm import SamplingParams
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize = False, add_generation_prompt = True)
        for p in prompts
    ]
    outputs = llm.generate(texts, SamplingParams(temperature = 1.0, max_tokens = 16, logprobs = 0), use_tqdm = False)
    return {
        "prompt_ids": [list(o.prompt_token_ids) for o in outputs],
        "completion_ids": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [[s[t].logprob for s, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)] for o in outputs],
        "env_reward": [float(len(o.outputs[0].token_ids)) for o in outputs],
    }
"""

SHAPES: dict[str, Shape] = {
    "sft-then-grpo": Shape(
        "Qwen3 (4B) GRPO, DeepSeek-R1 Qwen3 (8B) GRPO: SFT first, length filter, SamplingParams",
        before={"sft": SFT, "length filter": LENGTH_FILTER, "sampling": SAMPLED},
        config=f"vllm_sampling_params = vllm_sampling_params, temperature = 1.0, warmup_ratio = 0.1,\n    "
        f"{OPTIONS['lengths']} {ONE_OF_FOUR}",
        after={"generate": FAST_GENERATE, "merged": MERGED},
    ),
    "without-the-seed": Shape(
        "the one above with `seed = 3407` taken out of SamplingParams",
        before={"sft": SFT, "length filter": LENGTH_FILTER, "sampling": SAMPLED.replace("    seed = 3407,\n", "")},
        config=f"vllm_sampling_params = vllm_sampling_params, temperature = 1.0, warmup_ratio = 0.1,\n    "
        f"{OPTIONS['lengths']} {ONE_OF_FOUR}",
        after={"generate": FAST_GENERATE, "merged": MERGED},
    ),
    "llama-gsm8k": Shape(
        "Llama 3.1 (8B), Qwen2.5 (3B), Mistral v0.3 (7B) GRPO",
        config="adam_beta1 = 0.9, adam_beta2 = 0.99, warmup_ratio = 0.1, max_grad_norm = 0.1,\n    "
        f"{OPTIONS['lengths']} {ONE_OF_FOUR.replace('4', '6')}",
        after={"generate": FAST_GENERATE, "merged": MERGED, "gguf": GGUF},
    ),
    "advanced-llama": Shape(
        "Advanced Llama 3.2 (3B) GRPO LoRA: length filter, batch equal to the group",
        before={"length filter": LENGTH_FILTER},
        after={"generate": FAST_GENERATE, "merged": MERGED},
    ),
    "phi-4": Shape(
        "Phi 4 (14B) GRPO: is_bfloat16_supported, PatchFastRL not called",
        imports="FastLanguageModel, is_bfloat16_supported",
        adapter='target_modules = ["gate_proj", "up_proj", "down_proj"],\n    use_gradient_checkpointing = "unsloth",',
        config=f"warmup_ratio = 0.1, {OPTIONS['lengths']} {ONE_OF_FOUR}",
    ),
    "old-patch-call": Shape(
        'notebooks of early 2025: PatchFastRL("GRPO", FastLanguageModel)',
        imports='FastLanguageModel, PatchFastRL, is_bfloat16_supported\nPatchFastRL("GRPO", FastLanguageModel)',
        config=f"use_vllm = True, warmup_ratio = 0.1, {OPTIONS['lengths']} {FOUR}",
    ),
    "gemma-3": Shape(
        "Gemma 3 (1B) GRPO: FastModel, load_in_8bit, full_finetuning, finetune_* switches, fast_inference left out",
        cls="FastModel",
        load="load_in_8bit = False, full_finetuning = False,",
        adapter=SWITCHES,
        config=f"adam_beta1 = 0.9, adam_beta2 = 0.99, warmup_ratio = 0.1, {OPTIONS['lengths']} {FOUR}",
        after={"generate": GENERATE},
    ),
    "gpt-oss-game": Shape(
        "gpt-oss (20B) GRPO, 2048 and kernel games: offload_embedding, sandboxed rewards, no engine",
        load="offload_embedding = True,",
        rewards=SANDBOX,
        config="temperature = 1.0, warmup_ratio = 0.1, max_prompt_length = 64, max_completion_length = 16,\n    "
        "per_device_train_batch_size = 1, gradient_accumulation_steps = 1, num_generations = 2,",
        after={"generate": GENERATE},
    ),
    "vision": Shape(
        "Qwen2.5 VL, Qwen3 VL, Gemma 3 Vision GRPO (imports and arguments only: the model is a text model)",
        cls="FastVisionModel",
        load=FAST,
        adapter=SWITCHES + ' use_rslora = False, loftq_config = None, use_gradient_checkpointing = "unsloth",',
        config='warmup_ratio = 0.1, adam_beta1 = 0.9, adam_beta2 = 0.99, importance_sampling_level = "sequence",\n'
        '    mask_truncated_completions = False, loss_type = "dr_grpo", '
        f"{OPTIONS['lengths']} {ONE_OF_FOUR.replace('4', '2')}",
    ),
    "fp8": Shape(
        "Qwen3 (8B) and Llama FP8 GRPO (load_in_fp8 = False here: fp8 needs a GPU)",
        load=FAST + " load_in_fp8 = False,",
        before={"sampling": SAMPLED},
        config=f"vllm_sampling_params = vllm_sampling_params, temperature = 1.0, warmup_ratio = 0.1,\n    "
        f"{OPTIONS['lengths']} {ONE_OF_FOUR}",
    ),
    "fast-inference-false": Shape(
        "notebooks without an engine: fast_inference = False, generate at the end",
        load="fast_inference = False,",
        config=f"temperature = 1.0, warmup_ratio = 0.1, {OPTIONS['lengths']} {ONE_OF_FOUR}",
        after={"for_inference": "FastLanguageModel.for_inference(model)\n", "generate": GENERATE},
    ),
    "fast-inference-left-out": Shape(
        "notebooks that rely on Unsloth's default, no engine",
        load="dtype = None,",
        config=f"temperature = 1.0, warmup_ratio = 0.1, {OPTIONS['lengths']} {FOUR}",
        after={"generate": GENERATE},
    ),
    "full-finetuning": Shape(
        "full_finetuning = True (without an engine: vLLM's CPU backend takes no weights in)",
        load="full_finetuning = True, fast_inference = False,",
        adapter="",
        config=f"temperature = 1.0, warmup_ratio = 0.1, {OPTIONS['lengths']} {FOUR}",
        after={"save": 'model.save_pretrained("full")\ntokenizer.save_pretrained("full")\n'},
    ),
    "openenv-rollout": Shape(
        "OpenEnv wordle and 2048: rollout_func, for_inference at the end",
        before={"rollout": ROLLOUT},
        rewards='def length_reward(completions, **kwargs):\n    return [float(r) for r in kwargs["env_reward"]]\n'
        "def answer_reward(completions, **kwargs):\n    return [0.0] * len(completions)\n",
        config=f'use_vllm = True, vllm_mode = "colocate", warmup_steps = 1, max_completion_length = 16, {FOUR}',
        trainer="rollout_func = rollout_func,",
        after={"for_inference": "FastLanguageModel.for_inference(model)\n", "generate": GENERATE},
        since=(0, 26),
    ),
    "rslora-dropout": Shape(
        "get_peft_model with all of its arguments",
        adapter=f'target_modules = {LINEARS}, lora_dropout = 0, bias = "none",\n'
        '    use_gradient_checkpointing = "unsloth", use_rslora = False, loftq_config = None,',
        load="dtype = None, " + FAST + ' rope_scaling = None, fix_tokenizer = True, device_map = "sequential",',
    ),
    "resume": Shape(
        "resume_from_checkpoint, and an adapter loaded by its directory",
        after={
            "resume": "training_args.max_steps = 3\n"
            + TRAINER.format(kind="GRPO", trainer="")
            + "trainer.train(resume_from_checkpoint = True)\n",
            "generate": FAST_GENERATE,
        },
    ),
}
