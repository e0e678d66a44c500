"""Time and peak memory of an export of merged weights, beside PEFT's merge_and_unload and save_pretrained.

    python benchmarks/bench_export.py --shape 0.5b --repeats 5

Writes a Qwen2 of the shape with random bfloat16 weights as shards, and a LoRA adapter on all seven linear layers. Each
way then runs in processes of its own, in turns, so that what else the machine does meets all of them; medians are
printed as a Markdown table. `peak` is the process' largest resident memory (ru_maxrss: with the libraries, and with
pages of files that it has mapped), `time` is on the clock, `CPU` is user and system time. Both without the imports of
torch, transformers and PEFT, which are the same and are printed as a row; `written` is what is on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# hidden size, size of the MLP, layers, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1b": (1536, 6144, 24, 12, 2, 151_936),
    "7b": (3584, 18944, 28, 28, 4, 152_064),
}
UNTIED = ("7b",)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = {
    "imports": "the imports alone",
    "peft": "PEFT: merge_and_unload, save_pretrained",
    "stream": "trlpatch, verify=False",
    "verified": "trlpatch",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--directory", type=Path, help="where the models are written; a temporary one by default")
    parser.add_argument("--child", choices=[*WAYS, "make"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "make":
        make(args.directory, args.shape, args.rank)
        print("{}")
    elif args.child:
        child(args.child, args.directory)
    if args.child:
        return
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=args.directory) as name:
        directory = Path(name)
        # In another process: on Linux a process starts with its parent's largest resident memory as its own.
        call(["--child", "make", "--shape", args.shape, "--rank", str(args.rank), "--directory", str(directory)])
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way in WAYS:
                runs[way].append(json.loads(call(["--child", way, "--directory", str(directory)])))
                shutil.rmtree(directory / "out", ignore_errors=True)
    show(runs, args.shape, args.repeats)


def call(arguments: list[str]) -> str:
    """Run this file as another process; its last line."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""} if arguments[1] != "make" else None,
    )
    return done.stdout.strip().splitlines()[-1]


def make(directory: Path, shape: str, rank: int) -> None:
    """Write base and adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, mlp, layers, heads, kv_heads, words = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=words, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=shape not in UNTIED,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU draws 7 B numbers for minutes
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).cpu()
    model.save_pretrained(directory / "base", max_shard_size="400MB")
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    adapted.peft_config["default"].base_model_name_or_path = str(directory / "base")
    adapted.save_pretrained(directory / "adapter")


def child(way: str, directory: Path) -> None:
    """Do it once and print what it took."""
    import peft
    import torch
    import transformers

    from trlpatch.export.merged import write_merged
    from trlpatch.export.opening import open_source

    started, worked = time.perf_counter(), time.process_time()
    out = directory / "out"
    if way == "peft":
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, directory / "adapter").merge_and_unload()
        model.save_pretrained(out)
    elif way != "imports":
        write_merged(open_source(directory / "adapter"), out, verify=way == "verified")
    took = {
        "time": time.perf_counter() - started,
        "cpu": time.process_time() - worked,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "written": sum(one.stat().st_size for one in out.glob("*")) / 2**20 if out.is_dir() else 0.0,
    }
    print(json.dumps(took))


def show(runs: dict[str, list[dict[str, float]]], shape: str, repeats: int) -> None:
    """Print the table."""
    middle = {
        way: {key: statistics.median(one[key] for one in found) for key in found[0]} for way, found in runs.items()
    }
    print(f"{shape}, medians of {repeats}\n")
    print("| way | time, s | CPU, s | peak, MiB | written, MiB | time / PEFT's | peak / PEFT's |")
    print("|---|---|---|---|---|---|---|")
    base = middle["peft"]
    for way, name in WAYS.items():
        one = middle[way]
        print(
            f"| {name} | {one['time']:.2f} | {one['cpu']:.2f} | {one['peak']:.0f} | {one['written']:.0f} | "
            f"{one['time'] / base['time']:.2f} | {one['peak'] / base['peak']:.2f} |"
        )


if __name__ == "__main__":
    main()
