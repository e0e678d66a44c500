"""Milliseconds from a trained LoRA adapter to an engine that has it, and of the check before a rollout.

    python benchmarks/bench_handover.py --shape 7b --engine minimal        # a GPU; half a minute
    python benchmarks/bench_handover.py --shape 7b --rank 16 --repeats 20  # the same with vLLM's own engine
    python benchmarks/bench_handover.py --shape structure --engine minimal # a CPU

Builds a Qwen2 of the shape with random weights, an adapter on all seven linear layers in float32 and beside it a real
vLLM engine, or the buffers of one (`minimal_engine.py`), on the GPU or the CPU. Prints medians as a Markdown table:
`hand_over` is what a patched trainer calls where TRL synchronised weights, `lora_request` what it calls before every
rollout. Before every timed call there is a step as in training (forward, backward, fused AdamW) and what the row says:
what a forward pass leaves behind in the processor's caches, nothing of the model, is part of the price. The device is
idle before the call, and at its end.

`ms` is the time of the call, `p90` what nine of ten calls do not exceed. `python` is what of it the host looked at the
model and decided, `launches` what it took to start the copy, `waited` what it waited for it: together they are the
call, and they overlap with `device`, which is the copy itself, by the device's clock. On a CPU all are processor time,
and the copy is the host's own work. `calls` are those of Python and C functions in one call, as `sys.setprofile`
counts them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    parser.add_argument("--engine", choices=("vllm", "minimal"), default="vllm")
    parser.add_argument("--ways", action="store_true", help="also the ways that are taken where buffers are unusual")
    arguments = parser.parse_args()
    if arguments.ways and arguments.engine == "minimal":
        parser.error("--ways needs --engine vllm: a minimal one has no other ways")

    import torch
    import vllm

    with tempfile.TemporaryDirectory() as directory:
        policy, engine = build(
            arguments.shape,
            arguments.rank,
            arguments.max_lora_rank or arguments.rank,
            Path(directory),
            minimal=arguments.engine == "minimal",
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    size = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    linears = SHAPES[arguments.shape][2] * len(TARGETS)
    print(
        f"{arguments.shape}, r={arguments.rank}, max_lora_rank={arguments.max_lora_rank or arguments.rank}, "
        f"{linears} linears, {size / 1e6:.1f} M adapter parameters; engine: {arguments.engine}, vLLM "
        f"{vllm.__version__}, torch {torch.__version__}, {device}; medians of {arguments.repeats} calls\n"
    )
    parts = ("python", "launches", "waited", "device")
    print(f"| | ms | p90 | {' | '.join(parts)} | calls |\n|---|{'---|' * (3 + len(parts))}")
    for name, samples in measure(policy, engine, arguments.repeats, ways=arguments.ways):
        medians = [statistics.median(getattr(one, what) for one in samples) for what in ("ms", *parts)]
        medians.insert(1, ninth_of_ten([one.ms for one in samples]))
        print(f"| {name} | {' | '.join(f'{one:.3f}' for one in medians)} | {samples[-1].calls or ''} |", flush=True)


def ninth_of_ten(numbers: list[float]) -> float:
    """Return the smallest of the numbers that nine of ten do not exceed."""
    return sorted(numbers)[-(-len(numbers) * 9 // 10) - 1]


@dataclass
class Sample:
    """One timed call, in ms."""

    ms: float
    launches: float
    waited: float
    device: float
    calls: int = 0

    @property
    def python(self) -> float:
        """What the host did besides."""
        return self.ms - self.launches - self.waited


class CopyClock:
    """Times the copies of a process from now on: how long the host waits for one, and how long the device takes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        import torch

        from trlpatch.engine.adapter_sync.foreach_copy import ForeachCopy
        from trlpatch.engine.adapter_sync.fused_copy import FusedCopy

        self._clock = clock
        self._events: list[tuple[Any, Any]] = []
        self._launching = self._waited = self._ran = 0.0
        launch, answer, start = FusedCopy._launch, FusedCopy.answer, ForeachCopy.start

        def timed_launch(copy: Any, *arguments: Any) -> None:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            begin = clock()
            launch(copy, *arguments)
            self._launching += clock() - begin
            after.record()
            self._events.append((before, after))

        def timed_answer(copy: Any) -> list[int]:
            begin = clock()
            found = answer(copy)
            self._waited += clock() - begin
            return found

        def timed_start(copy: Any, *arguments: Any) -> Any:
            begin = clock()
            found = start(copy, *arguments)
            self._ran += clock() - begin
            return found

        FusedCopy._launch, FusedCopy.answer = timed_launch, timed_answer  # type: ignore[method-assign, assignment]
        ForeachCopy.start = timed_start  # type: ignore[method-assign, assignment]

    def sample(self, call: Callable[[], Any], settle: Callable[[], None]) -> Sample:
        """Time one call."""
        self._events, self._launching, self._waited, self._ran = [], 0.0, 0.0, 0.0
        begin = self._clock()
        call()
        settle()
        total = (self._clock() - begin) * 1e3
        device = self._ran * 1e3 + sum(before.elapsed_time(after) for before, after in self._events)
        return Sample(total, self._launching * 1e3, (self._waited + self._ran) * 1e3, device)


def build(shape: str, rank: int, max_lora_rank: int, directory: Path, *, minimal: bool = False) -> tuple[Any, Any]:
    """Return (PEFT model, engine); the engine first, because it measures the memory that is free."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.minimal_engine import MinimalEngine
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine: Any = (
        MinimalEngine(config, max_lora_rank, device) if minimal else vllm_engine(config, max_lora_rank, directory)
    )
    torch.manual_seed(0)
    with torch.device(device):
        base = Qwen2ForCausalLM(config).to(torch.bfloat16)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        policy = get_peft_model(base, lora)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not minimal:
        take_weights(base, engine)
    attach_engine(policy, engine, check=False)  # dummy weights
    return policy, engine


def vllm_engine(config: Any, max_lora_rank: int, directory: Path) -> Any:
    """Build a real engine with random weights."""
    from vllm import LLM

    config.save_pretrained(directory)
    return LLM(
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


def measure(policy: Any, engine: Any, repeats: int, *, ways: bool) -> Iterator[tuple[str, list[Sample]]]:
    """Yield the name and the samples of every row."""
    import torch

    from trlpatch import hooks
    from trlpatch.engine.publisher import AdapterFiles, Registration
    from trlpatch.engine.state import state_of

    owner, state = Owner(policy, engine), state_of(engine)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)  # the default of transformers' trainer
    tokens = torch.arange(16, device=trained[0].device).view(1, -1)
    clock = CopyClock(time.perf_counter if torch.cuda.is_available() else time.process_time)

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
        if hooks.lora_request(owner, engine) is None:
            raise SystemExit("the adapter was not handed over: trlpatch's log says why")

    def handed_over() -> None:
        step()
        hand_over()

    def handed_over_and_forward() -> None:
        handed_over()
        forward()

    def timed(call: Callable[[], Any], before: Callable[[], Any] = step, *, count: int = repeats) -> list[Sample]:
        samples = []
        for _ in range(count):
            before()
            settle()
            samples.append(clock.sample(call, settle))
        return samples

    def counted(call: Callable[[], Any], before: Callable[[], Any] = step) -> list[Sample]:
        samples = timed(call, before)
        before()
        samples[-1].calls = calls_of(call)
        return samples

    yield "hand_over, the first (registers)", timed(hand_over, count=1)
    timed(hand_over, count=3)  # compiles, where there is something to compile
    assert state.adapter_sync is not None
    way = state.adapter_sync.description
    way += f", {type(getattr(getattr(state.adapter_sync, '_current', None), 'copy', None)).__name__}"
    separate = state.shared_weights
    for shared in (False, True):
        state.shared_weights = shared  # as far as a check asks: it compares no base weights then
        weights = "shared" if shared else "separate"
        timed(hand_over, count=2)
        yield f"{weights} weights: hand_over, trained since ({way})", counted(hand_over)
        yield f"{weights} weights: lora_request, straight after it", counted(lora_request, handed_over)
        yield f"{weights} weights: lora_request, a forward after it", counted(lora_request, handed_over_and_forward)
        yield f"{weights} weights: lora_request, trained since", counted(lora_request)
    state.shared_weights = separate
    others = (("registered anew each time", Registration(engine)), ("through files", AdapterFiles(engine)))
    for name, other in others if ways else ():
        state.adapter_sync, state.published = other, None
        yield f"hand_over ({name})", timed(hand_over)


def calls_of(call: Callable[[], Any]) -> int:
    """Count the calls of Python and C functions in one call."""
    found = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


if __name__ == "__main__":
    main()
