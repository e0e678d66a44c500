"""Milliseconds to put a trained policy into an engine's weights: in place, and as TRL pushes them, in the same run.

    python benchmarks/bench_weights.py --shape 7b                          # a GPU: torch, Triton, TRL's push
    python benchmarks/bench_weights.py --shape structure --repeats 5       # a CPU: torch, TRL's push

Builds a vLLM engine without LoRA and beside it a Qwen2 of the same shape and weights, in bfloat16: once under a LoRA
adapter in float32 on all seven linear layers, once trained in full. Prints medians as a Markdown table. `TRL's push`
is what TRL 1.16 does where it synchronises colocated weights: merge the adapter, hand every parameter to vLLM's
loader, unmerge, reset the prefix cache. `in place` is `write_policy`, all of it: walk, content sums, writes, reset.
`first` also proves the places. `check` tells whether the engine has the policy, before a rollout. The device is idle
before each call and at its end; before each call every trained parameter moves, by an amount that bfloat16 keeps.
`elements` are those of the engine that are not what float32 arithmetic rounded once gives. On a CPU times are
processor time, and linear weights are kept as they are loaded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read by vLLM when the engine is built
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.bench_handover import SHAPES, TARGETS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--utilization", type=float, default=0.3, help="the engine's share of the device")
    arguments = parser.parse_args()

    import torch
    import vllm

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as directory:
        engine, config = build_engine(arguments.shape, Path(directory), arguments.utilization, cuda=cuda)
    print(
        f"{arguments.shape}, r={arguments.rank}; vLLM {vllm.__version__}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}; medians of {arguments.repeats} calls\n"
    )
    print("| policy | way | ms | slowest ms | elements not as rounded once |\n|---|---|---|---|---|")
    for name, rank in (("LoRA", arguments.rank), ("full fine-tuning", 0)):
        policy = build_policy(config, engine, rank, cuda=cuda)
        bench = Bench(policy, engine, arguments.repeats, cuda=cuda)
        for way, samples, wrong in bench.rows():
            print(f"| {name} | {way} | {statistics.median(samples):.2f} | {max(samples):.2f} | {wrong} |", flush=True)
        del policy, bench


def build_engine(shape: str, directory: Path, utilization: float, *, cuda: bool) -> tuple[Any, Any]:
    """Return (engine with random weights, its transformers config)."""
    from transformers import Qwen2Config
    from vllm import LLM

    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=152064 if cuda else 1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        architectures=["Qwen2ForCausalLM"],
        tie_word_embeddings=False,
    )
    config.save_pretrained(directory)
    if not cuda:
        keep_linear_weights()
    engine = LLM(
        model=str(directory),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        gpu_memory_utilization=utilization,
    )
    return engine, config


def keep_linear_weights() -> None:
    """Have vLLM's CPU backend compute with linear weights as they are loaded."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


def build_policy(config: Any, engine: Any, rank: int, *, cuda: bool) -> Any:
    """Return a model with the engine's weights; with a LoRA adapter unless `rank` is 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForCausalLM

    from trlpatch.engine import probes
    from trlpatch.engine.sharing.names import EngineNames

    module = probes.engine_module(engine)
    assert module is not None
    with torch.device("cuda" if cuda else "cpu"):
        base = Qwen2ForCausalLM(config).to(torch.bfloat16)
    names = EngineNames(module)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            target = names.view(name, parameter.shape)
            target.normal_(std=0.02)  # vLLM's dummies are so small that bfloat16 has gaps between them
            parameter.copy_(target)
    if not rank:
        return base
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def trl_push(policy: Any, engine: Any) -> None:
    """As `VLLMGeneration.sync_weights` of TRL 1.16 in colocate mode, without its gathering of shards."""
    model = engine.llm_engine.model_executor.driver_worker.model_runner.model
    peft = hasattr(policy, "merge_adapter")
    if peft:
        policy.merge_adapter()
    for name, parameter in policy.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if peft and policy.prefix in plain:
            continue
        model.load_weights([(plain, parameter.data)])
    if peft:
        policy.unmerge_adapter()
    engine.reset_prefix_cache()


class Bench:
    """One policy and one engine."""

    def __init__(self, policy: Any, engine: Any, repeats: int, *, cuda: bool) -> None:
        self._policy, self._engine, self._repeats, self._cuda = policy, engine, repeats, cuda
        self._clock: Callable[[], float] = time.perf_counter if cuda else time.process_time

    def rows(self) -> Any:
        """Yield (way, samples in ms, share of wrong elements) of every row; TRL's way last: it moves the base."""
        from trlpatch.engine.weights_publisher import holds_policy
        from trlpatch.options import MERGE_KERNEL
        from trlpatch.policy import bit_sums

        kernels = {"Triton": "1"} if self._cuda and bit_sums.kernel_module() is not None else {}
        for by, switch in (kernels | {"torch": "0"}).items():
            os.environ[MERGE_KERNEL] = switch
            yield f"in place, {by}, first", self._timed(self._write, 1), self._wrong()
            self._timed(self._write, 2)  # the 2nd and the 4th count what rounds back, the 8th as well
            yield f"in place, {by}", self._timed(self._write), self._wrong()
            yield f"check, {by}", self._timed(lambda: holds_policy(self._policy, self._engine), moves=False), ""
        yield "TRL's push", self._timed(lambda: trl_push(self._policy, self._engine)), self._wrong()

    def _write(self) -> None:
        from trlpatch.engine.weights_publisher import write_policy

        refused = write_policy(self._policy, self._engine)
        if refused is not None:
            raise SystemExit(f"weights were not written in place: {refused}")

    def _timed(self, call: Callable[[], object], count: int | None = None, *, moves: bool = True) -> list[float]:
        samples = []
        for _ in range(count or self._repeats):
            if moves:
                self._train()
            self._settle()
            begin = self._clock()
            call()
            self._settle()
            samples.append((self._clock() - begin) * 1e3)
        return samples

    def _train(self) -> None:
        import torch

        with torch.no_grad():
            for parameter in self._policy.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.02).add_(1e-3)

    def _settle(self) -> None:
        import torch

        if self._cuda:
            torch.cuda.synchronize()

    def _wrong(self) -> str:
        """Count what differs from float32 arithmetic rounded once, read through vLLM's names."""
        import torch

        from trlpatch.engine import probes
        from trlpatch.engine.sharing.names import EngineNames
        from trlpatch.engine.weights_in_place import merge
        from trlpatch.policy.policy_weights import policy_weights

        module = probes.engine_module(self._engine)
        assert module is not None
        names, wrong, of = EngineNames(module), 0, 0
        with torch.no_grad(), merge.float32_products():
            for weight in policy_weights(self._policy):
                target = names.view(weight.path, weight.base.shape)
                for rows in merge.row_chunks(target):
                    right = merge.merged(weight, rows, target.device).to(target.dtype)
                    wrong += int((target[rows] != right).sum())
                of += target.numel()
        return f"{wrong / of:.3%}"


if __name__ == "__main__":
    main()
