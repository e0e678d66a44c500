"""Milliseconds from a trained LoRA adapter to an engine that has it, and of the check before a rollout.

    python benchmarks/bench_handover.py --shape 7b --rank 16 --repeats 20      # a GPU
    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/bench_handover.py --shape structure   # vLLM's CPU backend

Builds a Qwen2 of the shape with random weights, an adapter on all seven linear layers in float32 and a real vLLM
engine beside it, on the GPU or vLLM's CPU backend. Prints medians as a Markdown table: `hand_over` is what a patched
trainer calls where TRL synchronised weights, `lora_request` what it calls before every rollout. Before every timed
call there is a step as in training (forward, backward, fused AdamW) or, where the row says so, a forward pass alone:
what a forward pass leaves behind is part of the price. The device is idle before the call, and at its end.
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
    parser.add_argument("--ways", action="store_true", help="also the ways that are taken where buffers are unusual")
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
    for name, samples in measure(policy, engine, arguments.repeats, ways=arguments.ways).items():
        print(f"| {name} | {statistics.median(samples):.2f} | {max(samples):.2f} |", flush=True)


def build(shape: str, rank: int, max_lora_rank: int, directory: Path) -> tuple[Any, Any]:
    """Return (PEFT model, engine); the engine first, because it measures the memory that is free."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from vllm import LLM

    from trlpatch import attach_engine

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
    take_weights(base, engine)
    attach_engine(policy, engine)
    return policy, engine


def take_weights(base: Any, engine: Any) -> None:
    """Give the model the base weights of the engine, as far as they can be read (vLLM's CPU backend repacks them)."""
    import torch

    from trlpatch.engine import probes

    worker, module = probes.worker_lora_manager(engine), probes.engine_module(engine)
    assert worker is not None
    assert module is not None
    inside = {name.replace(".base_layer.", "."): weight for name, weight in module.named_parameters()}
    packed = worker._adapter_manager.packed_modules
    matrices = {
        path.removesuffix(".base_layer"): layer.weight
        for path, layer in base.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".lora_" not in path
    }
    with torch.no_grad():
        for name, weight in inside.items():
            path = name.removesuffix(".weight")
            members = [matrices[member] for member in packed.get(path, [path]) if member in matrices]
            if members and weight.dim() == 2 and sum(member.numel() for member in members) == weight.numel():
                parts = weight.split([member.shape[0] for member in members])
                for member, part in zip(members, parts, strict=True):
                    member.copy_(part)


def measure(policy: Any, engine: Any, repeats: int, *, ways: bool) -> dict[str, list[float]]:
    """Return the samples of every row, in ms."""
    import torch

    from trlpatch import hooks
    from trlpatch.engine.publisher import AdapterFiles, Registration
    from trlpatch.engine.state import state_of

    owner, state = Owner(policy, engine), state_of(engine)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)  # the default of transformers' trainer
    tokens = torch.arange(16, device=trained[0].device).view(1, -1)

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            policy(input_ids=tokens)

    def step() -> None:
        policy(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def hand_over() -> None:
        if not hooks.hand_over(owner):
            raise SystemExit("the adapter was not handed over: trlpatch's log says why")

    def lora_request() -> None:
        hooks.lora_request(owner, engine)

    def handed_over() -> None:
        step()
        hand_over()
        forward()

    def timed(call: Callable[[], Any], before: Callable[[], Any] = step, *, count: int = repeats) -> list[float]:
        samples = []
        for _ in range(count):
            before()
            settle()
            start = time.perf_counter()
            call()
            settle()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples

    rows = {"hand_over, the first (registers)": timed(hand_over, count=1)}
    timed(hand_over, count=2)  # compiles, where there is something to compile
    assert state.adapter_sync is not None
    way = state.adapter_sync.description
    way += f", {type(getattr(getattr(state.adapter_sync, '_current', None), 'copy', None)).__name__}"
    rows[f"hand_over ({way})"] = timed(hand_over)
    rows["lora_request, a forward after the hand_over"] = timed(lora_request, handed_over)
    rows["lora_request, nothing after the last one"] = timed(lora_request, lambda: None)
    rows["lora_request, the adapter has been trained"] = timed(lora_request)
    others = (("registered anew each time", Registration(engine)), ("through files", AdapterFiles(engine)))
    for name, other in others if ways else ():
        state.adapter_sync, state.published = other, None
        rows[f"hand_over ({name})"] = timed(hand_over)
    return rows


if __name__ == "__main__":
    main()
