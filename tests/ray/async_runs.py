"""AsyncGRPOTrainer, and GRPO with prefetch, on one real engine on a Ray actor: on request, not in CI.

    python -m tests.ray.async_runs OUT.json [CASE ...]

The TRL release is the one that can be imported. Of TRL's async trainer two things need a GPU, and are stood in for:
the attention kernel (FlashAttention 3 from the hub) and, from TRL 1.16 on, the name of the device at construction.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.cases import case
from tests.ray.rig import Rig, checkpoint_in, cluster, create

STEPS = 4


def prefetch(rig: Rig) -> dict[str, Any]:
    """Every batch but the first is generated while the one before is trained on."""
    from tests.cpu.small_grpo import small_grpo
    from tests.cpu.training import logged

    rig.engines.prefetch = 1
    trainer = small_grpo(
        rig.policy(), rig.directory, config={"max_steps": STEPS, "vllm_importance_sampling_mode": "token_truncate"}
    )
    trainer.train()
    made, rig.engines._prefetched, rig.engines.prefetch = rig.engines._prefetched, None, 0
    return {
        "used": made.used,
        "wasted": made.wasted,
        "sent": rig.engines.adapter_version,
        "difference": logged(trainer, "sampling/sampling_logp_difference/max"),
        "losses": logged(trainer, "loss"),
    }


def asynchronous(rig: Rig) -> dict[str, Any]:
    """A LoRA policy where the release has it: the adapter alone travels, and the base weights stay to the bit."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    import trlpatch.ray

    stand_in()
    fields = AsyncGRPOConfig.__dataclass_fields__
    settings: dict[str, Any] = {
        "output_dir": str(rig.directory / "async"), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
        "num_generations": 4, "max_completion_length": 8, "max_steps": STEPS, "max_staleness": 1, "token_budget": -1,
        "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "dtype": "float32",
    }  # fmt: skip
    lora = "peft_config" in AsyncGRPOTrainer.__init__.__code__.co_varnames
    extra: dict[str, Any] = {"peft_config": LoraConfig(r=8, target_modules=list(tiny.TARGETS))} if lora else {}
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i} {i + 1}"}] for i in range(16)]})
    trainer = AsyncGRPOTrainer(
        str(rig.checkpoint),
        **trlpatch.ray.async_rollouts(
            rig.engines,
            [lambda completion_ids, **_: [float(sum(token % 2 for token in ids)) for ids in completion_ids]],
            rows,
            args=AsyncGRPOConfig(**{name: value for name, value in settings.items() if name in fields}),
            **extra,
        ),
    )
    before = rig.engines.version
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(rig.checkpoint).state_dict()
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in trainer.model.state_dict().items()
    }
    history = trainer.state.log_history
    return {
        "lora": lora,
        "before": str(before),
        "after": str(rig.engines.version),
        "base_is_the_checkpoints": all(torch.equal(base[name], trained[name]) for name in base),
        "ratio": [entry["ratio"] for entry in history if "ratio" in entry],
        "off_policy": [entry["num_steps_off_policy"] for entry in history if "num_steps_off_policy" in entry],
        "totals": vars(trainer.rollout_worker.totals),
        "model_version": trainer.model_version,
    }


def stand_in() -> None:
    """In the place of what TRL's trainer has for CUDA alone."""
    import torch
    import trl.experimental.async_grpo.async_grpo_trainer as module

    def varlen(q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, *_: Any, softmax_scale: Any = None, **__: Any) -> Any:
        out = torch.empty_like(q)
        bounds = [ends.tolist() for ends in (ends_q, ends_k)]
        for a, b, c, d in zip(bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True):
            one, *both = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
            keys, values = (x.repeat_interleave(one.shape[0] // x.shape[0], 0) for x in both)
            seen = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril((d - c) - (b - a))
            attend = torch.nn.functional.scaled_dot_product_attention
            out[a:b] = attend(one, keys, values, attn_mask=seen, scale=softmax_scale).transpose(0, 1)
        return out

    if hasattr(module, "get_peak_flops_per_device"):
        module.get_peak_flops_per_device = lambda *_: None
    try:
        from trl.experimental.async_grpo import packing
    except ImportError:
        owner: Any = module if hasattr(module, "create_model_from_path") else module.AutoModelForCausalLM
        name = "create_model_from_path" if owner is module else "from_pretrained"
        original = getattr(owner, name)
        setattr(owner, name, lambda *a, **kw: original(*a, **{**kw, "attn_implementation": "sdpa"}))
    else:
        packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen)


CASES = {"prefetch": prefetch, "asynchronous": asynchronous}
ON_REQUEST = {"full": asynchronous}
"""TRL below 1.14, alone: on an engine without LoRA."""


def main(out: Path, chosen: list[str]) -> None:
    """Report what happened."""
    import trlpatch

    trlpatch.PatchFastRL()
    checkpoint = checkpoint_in(out.parent)
    report: dict[str, Any] = {}
    with cluster():
        # Full weights (TRL below 1.14): loaders of vLLM below 0.25 do not know layers that LoRA has wrapped.
        changes = {} if chosen != ["full"] else {"enable_lora": False}
        rig = Rig(out.parent, checkpoint, create(checkpoint, 1, **changes))
        for name in chosen or list(CASES):
            began = time.monotonic()
            with case(name, 1800.0):
                report[name] = {**{**CASES, **ON_REQUEST}[name](rig), "seconds": time.monotonic() - began}
            out.write_text(json.dumps(report, indent=1))
            print(name, report[name], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
