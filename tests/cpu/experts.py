"""A tiny Qwen3-MoE with an adapter on attention: GRPO on a real vLLM CPU engine, the gap and its control.

    python -m tests.cpu.experts OUT.json

vLLM 0.28 has one kernel for experts in an engine with LoRA, which no CPU has; `lora_target_modules` keeps LoRA off the
experts, and here they are told so. What `all-linear` meets is in the report, too. On request: no tier has it.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def checkpoint(directory: Path) -> Path:
    """Save random weights: 4 experts, 2 of them for each token."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    words = tiny.tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(words), hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        norm_topk_prob=True, initializer_range=0.05,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def experts_without_lora() -> None:
    """Have vLLM choose the experts' kernel as for an engine without LoRA."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    construct = FusedMoEConfig.__init__

    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **{**kwargs, "is_lora_enabled": False})

    FusedMoEConfig.__init__ = constructed


def run(directory: Path) -> dict[str, Any]:
    """Train two steps, score what the engine says of the trained policy, then try an adapter on all linear layers."""
    import trlpatch

    trlpatch.PatchFastRL("grpo")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from tests.cpu.small_grpo import gap, small_grpo
    from tests.cpu.training import Recorder, engine_of

    experts_without_lora()
    place = checkpoint(directory / "model")
    engine = tiny.engine(place, lora_target_modules=ATTENTION)

    def policy(targets: Any) -> Any:
        base = AutoModelForCausalLM.from_pretrained(place, dtype="float32")
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))

    model = trlpatch.attach_engine(policy(ATTENTION), engine)
    tiny.move(model, seed=1)
    trainer = small_grpo(model, directory, config={"max_steps": 2, "learning_rate": 1.5e-2})
    recorder = Recorder(trainer, engine_of(trainer))
    trainer.train()
    recorder.close()
    params = SamplingParams(max_tokens=12, logprobs=0, temperature=1.0, seed=0, ignore_eos=True)
    outputs = model.fast_generate(tiny.prompts(4), params, use_tqdm=False)
    found: dict[str, Any] = {
        "rollouts": [{name: rollout[name] for name in ("adapter", "gap")} for rollout in recorder.rollouts],
        "gap": max(gap(model, output) for output in outputs),
    }
    with model.disable_adapter():
        found["control"] = min(gap(model, output) for output in outputs)
    trlpatch.detach_engine(model)
    try:
        other = trlpatch.attach_engine(policy("all-linear"), engine)
        other.fast_generate(tiny.prompts(1), params, use_tqdm=False)
        found["all-linear"] = "carried"
    except Exception as error:
        found["all-linear"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        Path(sys.argv[1]).write_text(json.dumps(run(Path(scratch)), indent=1))
