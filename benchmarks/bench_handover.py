"""Milliseconds from a changed LoRA adapter to an engine that has it, for every way of handing it over.

    python benchmarks/bench_handover.py --shape 7b --rank 16 --repeats 20

Builds a Qwen2 of the shape with random weights, an adapter on all seven linear layers in float32 and a real vLLM
engine beside it, on the GPU or vLLM's CPU backend. Prints medians as a Markdown table: `hand_over` is what a patched
trainer calls where TRL synchronised weights, `lora_request` what it calls before every rollout. The adapter is
changed, and the device idle, before every timed call; a call has ended when the device is idle again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read by vLLM when the engine is built
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# hidden size, size of the MLP, layers, heads, key-value heads
SHAPES = {
    "structure": (64, 128, 28, 4, 2),  # the modules of a 7B model, of a size that costs only the calls
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "7b": (3584, 18944, 28, 28, 4),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Owner:
    """As much of a trainer as the hooks look at."""

    def __init__(self, model: Any, llm: Any) -> None:
        self.model = model
        self.llm = llm
        self.mode = "colocate"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-lora-rank", type=int, help="of the engine; the rank, unless given")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()

    import torch
    import vllm

    with tempfile.TemporaryDirectory() as directory:
        policy, engine = build(
            arguments.shape, arguments.rank, arguments.max_lora_rank or arguments.rank, Path(directory)
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    linears = SHAPES[arguments.shape][2] * len(TARGETS)
    print(
        f"{arguments.shape}, r={arguments.rank}, max_lora_rank={arguments.max_lora_rank or arguments.rank}, "
        f"{linears} linears, {size / 1e6:.1f} M adapter parameters; vLLM {vllm.__version__}, "
        f"torch {torch.__version__}, {device}; medians of {arguments.repeats} calls\n"
    )
    print("| | ms | slowest |\n|---|---|---|")
    for name, samples in measure(policy, engine, arguments.repeats).items():
        print(f"| {name} | {statistics.median(samples):.2f} | {max(samples):.2f} |", flush=True)


def build(shape: str, rank: int, max_lora_rank: int, directory: Path) -> tuple[Any, Any]:
    """Return (PEFT model, engine); the engine first, because it measures the memory that is free."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from vllm import LLM

    from trlpatch import attach_engine
    from trlpatch.engine.state import state_of

    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(directory)
    engine = LLM(
        model=str(directory),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=max_lora_rank,
        max_loras=1,
        max_model_len=256,
        max_num_seqs=8,
        gpu_memory_utilization=0.4,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = Qwen2ForCausalLM(config).to(torch.bfloat16)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        policy = get_peft_model(base, lora)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    attach_engine(policy, engine)
    state_of(engine).base_verdict[base] = None  # its weights are other random ones than the engine's
    return policy, engine


def measure(policy: Any, engine: Any, repeats: int) -> dict[str, list[float]]:
    """Return the samples of every row, in ms."""
    import torch

    from trlpatch import hooks
    from trlpatch.engine.publisher import AdapterFiles, Registration
    from trlpatch.engine.state import state_of

    owner, state = Owner(policy, engine), state_of(engine)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def change() -> None:
        with torch.no_grad():
            torch._foreach_add_(trained, 1e-3)

    def timed(call: Callable[[], Any], before: Callable[[], Any] = change, *, first: bool = False) -> list[float]:
        samples = []
        for _ in range(1 if first else repeats):
            before()
            settle()
            start = time.perf_counter()
            call()
            settle()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples

    rows = {"hand_over, the first (registers)": timed(lambda: hooks.hand_over(owner), first=True)}
    assert state.adapter_sync is not None
    way = state.adapter_sync.description
    rows[f"hand_over ({way})"] = timed(lambda: hooks.hand_over(owner))

    def hand_over_a_change() -> None:
        change()
        hooks.hand_over(owner)

    rows["lora_request, after a hand_over"] = timed(lambda: hooks.lora_request(owner, engine), hand_over_a_change)
    rows["lora_request, the adapter has changed"] = timed(lambda: hooks.lora_request(owner, engine))
    for name, other in (("registered anew each time", Registration(engine)), ("through files", AdapterFiles(engine))):
        state.adapter_sync, state.published = other, None
        rows[f"hand_over ({name})"] = timed(lambda: hooks.hand_over(owner))
    return rows


if __name__ == "__main__":
    main()
