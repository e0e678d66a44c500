"""Shared base weights on a CUDA device, architecture by architecture, with random weights.

    python tests/gpu/sharing_archs.py --out sharing.json [llama qwen3 ...]

One process and one engine each, bfloat16, with LoRA and sleep mode, without graphs. Measured and judged: every base
parameter lies inside the engine's memory; building takes no memory; engine and model agree on a prompt's
log-probabilities, before and after training an adapter (which must move, while no base weight does), with gradient
checkpointing; a live LoRA request gives the adapter's log-probabilities; what would move or change base weights
raises.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.common import report, run_child

VOCABULARY = 515
"""Not a multiple of 64: vLLM pads it."""

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 128}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 128}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 64}),
    "gemma2": ("Gemma2", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 256}),
    "gemma3": ("Gemma3", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 256}),
    "phi3": ("Phi3", {"tie_word_embeddings": False, "sliding_window": None}),
    "phi3-tied": ("Phi3", {"tie_word_embeddings": True, "sliding_window": None}),
}
"""Name -> prefix of the classes in transformers, and what differs from `_COMMON`."""

FUSED_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

RIGHT = 0.05
"""Largest right answer of `compare_logits` for these models in bfloat16."""

ADAPTER_GAP = 0.1
"""Largest mean difference, in standard deviations, between engine and model with an adapter; without it, above 0.3."""


def checkpoint(name: str, directory: Path, *, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Save a random-weight model in which no two parameters are alike: norms and biases are random, too."""
    import torch
    import transformers

    prefix, settings = ARCHITECTURES[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    config = config_class(**{**_COMMON, **settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def targets_of(name: str) -> list[str]:
    return FUSED_TARGETS if name.startswith("phi3") else TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="all of them unless given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timeout", type=int, default=120, help="seconds an architecture")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.architectures) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(ARCHITECTURES)}")
    results: dict[str, Any] = {}
    print(
        f"{'architecture':14}{'ok':6}{'before':>9}{'after':>9}{'adapter':>9}{'control':>9}{'MiB':>7}{'s':>6}",
        flush=True,
    )
    for name in arguments.architectures or ARCHITECTURES:
        started = time.monotonic()
        result = run_child(Path(__file__), [name], timeout=arguments.timeout)
        result["seconds"] = round(time.monotonic() - started, 1)
        result["failures"] = failures(result)
        results[name] = result
        print(row(name, result), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1))
    return int(any(result["failures"] for result in results.values()))


def failures(result: dict[str, Any]) -> list[str]:
    """What was measured and should not have been; empty when all is well."""
    if "error" in result:
        return [result["error"]]
    checks = {
        "logits before": result["before"] <= RIGHT,
        "logits after": result["after"] <= RIGHT,
        "the engine's adapter": result["adapter"] <= ADAPTER_GAP,
        "the control without adapter": result["control"] > 3 * ADAPTER_GAP,
        "memory of the build": result["build_mib"] < 4,
        "the loss fell": result["losses"][-1] < result["losses"][0],
        "base weights unchanged": result["base_unchanged"],
        "not refused": not result["allowed"],
        "a no-op conversion": result["no_op_passes"],
        "generation config": result["generation_config"],
    }
    return [name for name, holds in checks.items() if not holds]


def row(name: str, result: dict[str, Any]) -> str:
    head = f"{name:14}{'FAIL' if result['failures'] else 'PASS':6}"
    if "error" in result:
        return f"{head}{result['error'][-400:]}"
    numbers = "".join(f"{result[key]:9.4f}" for key in ("before", "after", "adapter", "control"))
    return f"{head}{numbers}{result['build_mib']:7.1f}{result['seconds']:6.0f}  {', '.join(result['failures'])}"


# In the child.


def child(name: str) -> dict[str, Any]:
    import torch
    import transformers
    import vllm
    from vllm import LLM

    from trlpatch.engine.attach import attach_engine
    from trlpatch.engine.sharing import compare_logits, model_over_engine, verify_overlap

    with tempfile.TemporaryDirectory() as directory:
        checkpoint(name, Path(directory))
        engine = LLM(
            model=directory, dtype="bfloat16", enable_lora=True, max_lora_rank=16, max_loras=1, enforce_eager=True,
            enable_sleep_mode=True, max_model_len=256, gpu_memory_utilization=0.06, skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs", seed=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        model = model_over_engine(engine)
        built = (free - torch.cuda.mem_get_info()[0]) / 2**20
        verify_overlap(model, engine)
        result: dict[str, Any] = {
            "vllm": vllm.__version__, "transformers": transformers.__version__, "build_mib": built,
            "parameters": len(list(model.parameters())), "name": model.name_or_path == directory,
            "generation_config": model.generation_config.temperature == 0.5, "dtype": str(model.dtype),
            "attention": model.config._attn_implementation, "before": compare_logits(model, engine),
        }  # fmt: skip
        attach_engine(model, engine, shared_weights=True)
        return result | exercise(name, model, engine)


def exercise(name: str, model: Any, engine: Any) -> dict[str, Any]:
    """Train an adapter on the shared model for some steps, roll out with it, and try what is forbidden."""
    import torch
    from peft import LoraConfig, get_peft_model

    from trlpatch.engine.sharing import compare_logits

    before = [parameter.detach().clone() for parameter in model.parameters()]
    base = list(model.parameters())
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=targets_of(name), task_type="CAUSAL_LM")
    policy = get_peft_model(model, settings)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 48), generator=generator).to(model.device)
    losses = []
    for _ in range(12):
        loss = policy(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    policy.gradient_checkpointing_disable()
    policy.eval()
    prompt = ids[0].tolist()
    return {
        "losses": losses,
        "after": compare_logits(policy, engine),
        "adapter": gap(policy, engine, prompt, model.load_lora()),
        "control": gap(policy, engine, prompt, None),
        "allowed": allowed(policy),
        "no_op_passes": policy.to(model.device).to(model.dtype) is policy,
        "base_unchanged": all(torch.equal(a, b) for a, b in zip(before, base, strict=True)),
    }


def gap(policy: Any, engine: Any, ids: list[int], request: Any) -> float:
    """As compare_logits, with the adapter on: [len(ids) - 1] log-probabilities of both sides."""
    import torch
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate(
        [{"prompt_token_ids": ids}], sampling_params=params, lora_request=request, use_tqdm=False
    )
    steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    theirs = torch.tensor([step[token].logprob for token, step in steps], device=policy.device)
    with torch.no_grad():
        logprobs = torch.log_softmax(policy(torch.tensor([ids], device=policy.device)).logits[0, :-1].float(), -1)
    ours = logprobs.gather(1, torch.tensor(ids[1:], device=policy.device)[:, None]).squeeze(1)
    return float((ours - theirs).abs().mean() / logprobs.std(dim=1).mean())


def allowed(policy: Any) -> list[str]:
    """The forbidden operations that did not raise SharedWeights; empty when all did."""
    import torch

    from trlpatch.engine.sharing import check_frozen
    from trlpatch.errors import SharedWeights

    base = policy.get_base_model()
    layer = next(parameter for parameter in base.parameters() if not parameter.requires_grad)
    elsewhere = "meta" if layer.device.type == "cpu" else "cpu"
    other = torch.float32 if layer.dtype != torch.float32 else torch.bfloat16

    def train_a_base_weight() -> None:
        layer.requires_grad_(True)
        try:
            check_frozen(policy)
        finally:
            layer.requires_grad_(False)

    forbidden = {
        "to another device": lambda: policy.to(elsewhere),
        "to another dtype": lambda: policy.to(other),
        "half": policy.half,
        "double of the base": base.double,
        "merge_adapter": policy.merge_adapter,
        "unmerge_adapter": policy.unmerge_adapter,
        "merge_and_unload": policy.merge_and_unload,
        "resize": lambda: base.resize_token_embeddings(VOCABULARY + 1),
        "load_state_dict": lambda: base.load_state_dict(base.state_dict()),
        "train a base weight": train_a_base_weight,
    }
    passed = []
    for name, operation in forbidden.items():
        try:
            operation()
        except SharedWeights:
            continue
        passed.append(name)
    return passed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        report(child(sys.argv[2]))
    else:
        sys.exit(main())
