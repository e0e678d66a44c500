"""Small packages named `transformers` and `trl`, with what `trlpatch.runtime.compat` changes of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

ARGUMENTS = """
from dataclasses import dataclass, field, fields
from typing import Optional

@dataclass
class TrainingArguments:
    output_dir: Optional[str] = None
    warmup_steps: float = 0
    eval_strategy: str = "no"
    train_sampling_strategy: str = "random"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    include_for_metrics: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.seen = {one.name: getattr(self, one.name) for one in fields(self)}

    def to_dict(self):
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}
"""
TRAINER = """
class Trainer:
    def __init__(self, model=None, args=None, processing_class=None):
        self.model, self.args, self.processing_class = model, args, processing_class
"""
TOKENIZERS = """
class PreTrainedTokenizerBase:
    def apply_chat_template(self, conversation, tools=None, tokenize=True, return_dict=True, **kwargs):
        return {"input_ids": [1, 2]} if tokenize and return_dict else [1, 2] if tokenize else "text"
"""
CONFIGS = """
from dataclasses import dataclass
from typing import Optional
from transformers.training_args import TrainingArguments

@dataclass
class GRPOConfig(TrainingArguments):
    num_generations: int = 8
    steps_per_generation: Optional[int] = None
    generation_batch_size: Optional[int] = None
    use_liger_kernel: bool = False
    vllm_importance_sampling_correction: bool = True

    def __post_init__(self):
        super().__post_init__()
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        self.generation_batch_size = self.generation_batch_size or self.per_device_train_batch_size * steps
        if self.generation_batch_size % self.num_generations:
            raise ValueError("must be divisible by num_generations")
"""
SFT = """
from dataclasses import dataclass
from transformers.training_args import TrainingArguments

@dataclass
class SFTConfig(TrainingArguments):
    max_length: int = 1024
    packing: bool = False
"""
TRAINERS = """
from transformers.trainer import Trainer

class GRPOTrainer(Trainer):
    def __init__(self, model, reward_funcs=None, args=None, processing_class=None):
        super().__init__(model, args, processing_class)

    def _tokenize_prompts(self, prompts):
        return [list(range(len(one))) for one in prompts], None, {}

class SFTTrainer(Trainer):
    def __init__(self, model, args=None, processing_class=None):
        super().__init__(model, args, processing_class)
        if model == "bad":
            raise TypeError("inside: unexpected keyword argument 'tokenizer'")
"""


class Upstream:
    """The classes, imported when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        for module in (
            "transformers.training_args",
            "transformers.trainer",
            "transformers.tokenization_utils_base",
            "trl.trainer.grpo_config",
            "trl.trainer.sft_config",
            "trl.trainer.grpo_trainer",
        ):
            if hasattr(importlib.import_module(module), name):
                return getattr(sys.modules[module], name)
        raise AttributeError(name)

    def import_all(self) -> None:
        assert not hasattr(self, "nothing")


def write(place: Path) -> None:
    """Write both packages into `place`."""
    files = {
        "transformers/__init__.py": "",
        "transformers/training_args.py": ARGUMENTS,
        "transformers/trainer.py": TRAINER,
        "transformers/tokenization_utils_base.py": TOKENIZERS,
        "trl/__init__.py": "",
        "trl/trainer/__init__.py": "",
        "trl/trainer/grpo_config.py": CONFIGS,
        "trl/trainer/sft_config.py": SFT,
        "trl/trainer/grpo_trainer.py": TRAINERS,
    }
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
