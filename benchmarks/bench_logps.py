"""Memory and time of TRL's per-token log-probabilities, as it computes them and with `logps="chunked"`.

    python benchmarks/bench_logps.py --trl DIR/1.14.0                                 # a GPU: the head of a 7B model
    python benchmarks/bench_logps.py --trl DIR/1.14.0 --shape small --batches 8x64    # a CPU

Calls the `_get_per_token_logps_and_entropies` (0.18, 0.19: `_get_per_token_logps`) of TRL's GRPO on a random-weight
Qwen2 with one layer, whose head and vocabulary have the size of the shape; the layer is trained, the head is not. Each
way and batch (rows x tokens of a completion) is measured in a process of its own: a pass without gradients, and a
forward and a backward pass with entropies, as in training. `peak` is the most memory that these three allocate, the
first time, beyond what was there (CPU: resident in the process). `difference` is the largest from the first way: of
log-probabilities, of entropies, and of gradients in units of the largest gradient. Times on a CPU are its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# hidden size, size of the MLP, heads, key-value heads, vocabulary
SHAPES = {
    "small": (256, 512, 4, 2, 32_000),
    "1.5b": (1536, 8960, 12, 2, 151_936),
    "7b": (3584, 18_944, 28, 4, 152_064),
}
PROMPT = 16
MIB = 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="directory with the package trl; what is installed, unless given")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--batches", default="16x256,8x512,1x2048", help="rows x completion tokens, comma-separated")
    parser.add_argument("--ways", default="stock,chunked", help="stock, chunked, chunked=LOGITS (of a chunk at most)")
    parser.add_argument(
        "--precision",
        choices=["bf16", "float32", "bfloat16"],
        default="bf16",
        help="bf16: a bfloat16 model under autocast, with logits in float32, as bf16=True; else all in one dtype",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write every value as JSON")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "BATCH", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, batch, file = arguments.child
        measure(arguments, way, batch, Path(file))
        return
    document: dict[str, Any] = {"benchmark": "bench_logps", "command": " ".join(sys.argv), "results": []}
    for batch in arguments.batches.split(","):
        with tempfile.TemporaryDirectory() as directory:
            first = None
            for place, way in enumerate(arguments.ways.split(",")):
                file = Path(directory) / f"{place}.pt"
                found = child(way, batch, file)
                first = first or file
                found["difference"] = difference(first, file)
                document["results"].append(found)
    print(table(document["results"], arguments))
    text = json.dumps(document, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(f"\n{text}")


def child(way: str, batch: str, file: Path) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", way, batch, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}, {batch}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    print(f"{way} {batch}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(arguments: argparse.Namespace, way: str, batch: str, file: Path) -> None:
    """Measure one way and batch in this process; print a line of JSON, and save what was computed."""
    sys.path[:0] = [str(ROOT), *([str(arguments.trl)] if arguments.trl else [])]
    import torch

    report = None
    name, _, elements = way.partition("=")
    if name == "chunked":
        import trlpatch
        from trlpatch.policy import deferred_logits

        report = trlpatch.PatchFastRL("grpo", logps="chunked")
        deferred_logits.CHUNK_ELEMENTS = int(elements or deferred_logits.CHUNK_ELEMENTS)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = build(arguments.shape, arguments.precision, device)
    rows, length = map(int, batch.split("x"))
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (rows, PROMPT + length), device=device)
    trainer, call = trl_function(model)
    mask = torch.ones_like(ids)
    weights = torch.randn(rows, length, device=device)
    kept: dict[str, Any] = {}

    def without() -> None:
        with torch.no_grad():
            call(model, ids, mask, length)

    def forward() -> None:
        kept["logps"], kept["entropies"] = call(model, ids, mask, length)

    def backward() -> None:
        model.zero_grad()
        (kept["logps"] * weights).sum().backward()

    timed = {"no_grad_s": without, "forward_s": forward, "backward_s": backward}
    peak: dict[str, float] = {}
    seconds: dict[str, list[float]] = {part: [] for part in timed}
    for repeat in range(arguments.repeats + 1):
        kept.clear()
        before, first = allocated(cuda), repeat == 0
        for part, run in timed.items():
            took = clock(run, cuda)
            if not first:
                seconds[part].append(took)
            elif cuda and part == "no_grad_s":
                peak["no_grad_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
        if first:
            peak["peak_mib"] = ((torch.cuda.max_memory_allocated() if cuda else allocated(False)) - before) / MIB
    weight = model.model.layers[0].self_attn.q_proj.weight
    saved = {name: value.detach().cpu() for name, value in kept.items() if value is not None}
    torch.save({**saved, "gradient": weight.grad.cpu()}, file)
    versions = {"torch": torch.__version__, "trl": __import__("trl").__version__}
    found = {
        "way": way, "batch": batch, "device": torch.cuda.get_device_name() if cuda else "CPU", **versions, **peak,
        **{part: statistics.median(values) for part, values in seconds.items()}, "samples": seconds,
        "status": "".join(report.logps) if report else "",
    }  # fmt: skip
    assert trainer is not None  # what is known of it is known as long as it lives
    print(json.dumps(found))


def build(shape: str, precision: str, device: Any) -> Any:
    """Return a Qwen2 of one layer; with bf16, its forward pass is wrapped as `Accelerator.prepare_model` does."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if precision == "float32" else torch.bfloat16)
    with device:
        model = Qwen2ForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    if precision == "bf16":
        from accelerate.utils.operations import convert_outputs_to_fp32

        model.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(model.forward))
    return model


def trl_function(model: Any) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Return what stands for a trainer, and TRL's method of it as a function of (model, ids, mask, length)."""
    from inspect import unwrap

    from trl import GRPOTrainer

    class Trainer:
        """What the method reads of a trainer."""

        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    trainer: Any = Trainer(
        temperature=0.9, model_kwarg_keys={"logits_to_keep"}, use_liger_kernel=False, _entropy_bonus_enabled=False
    )
    if hasattr(GRPOTrainer, "_full_logits_logps"):
        trainer._full_logits_logps = GRPOTrainer._full_logits_logps.__get__(trainer)
    together = hasattr(GRPOTrainer, "_get_per_token_logps_and_entropies")
    method = unwrap(getattr(GRPOTrainer, f"_get_per_token_logps{'_and_entropies' if together else ''}"))

    def call(model: Any, ids: Any, mask: Any, length: int) -> tuple[Any, Any]:
        if not together:
            return method(trainer, model, ids, mask, length), None
        found = method(trainer, model, ids, mask, length, compute_entropy=True)
        return found[0], found[1]

    return trainer, call


def clock(run: Callable[[], None], cuda: bool) -> float:
    """Return seconds: of the wall with an idle GPU before and after, or of the CPU."""
    import torch

    if not cuda:
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def allocated(cuda: bool) -> int:
    """Return bytes on the GPU, whose peak starts anew, or the most that this process has had resident."""
    import torch

    if not cuda:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def difference(first: Path, file: Path) -> dict[str, float]:
    """Return how far the values of two files are apart."""
    import torch

    expected, found = torch.load(first), torch.load(file)
    apart = {name: float((found[name].float() - expected[name].float()).abs().max()) for name in expected}
    apart["gradient"] /= max(float(expected["gradient"].float().abs().max()), 1e-30)
    return apart


def table(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Return the results as a Markdown table, below a line that says what they are of."""
    head = results[0]
    versions = f"TRL {head['trl']}, torch {head['torch']}, {head['device']}"
    lines = [
        f"{arguments.shape} head, {arguments.precision}; {versions}; medians of {arguments.repeats}\n",
        "| batch | way | peak MiB | no-grad ms | forward ms | backward ms | difference: logps, entropies, gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        times = " | ".join(f"{found[part] * 1e3:.1f}" for part in ("no_grad_s", "forward_s", "backward_s"))
        apart = ", ".join(f"{value:.1e}" if value else "0" for value in found["difference"].values())
        lines.append(f"| {found['batch']} | {found['way']} | {found['peak_mib']:.0f} | {times} | {apart} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
