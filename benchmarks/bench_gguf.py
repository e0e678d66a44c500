"""Memory and time of GGUF export beside loading the model: `python -m benchmarks.bench_gguf`.

A random Qwen2 of the shape of Qwen2.5-0.5B is saved in bfloat16 and exported as some types, each export in a process
of its own, whose peak memory is measured ten times a second, with its children's. "load" is `from_pretrained` in
bfloat16, and the weights read once. Exports are not verified: the reference is the whole model in float32. Needs the
extra `gguf` and psutil. `--llama-quantize PATH` times llama.cpp's own quantizer beside it: from a file in float32,
which an export does not write.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
print(sum(parameter.sum().item() for parameter in model.parameters()) != 0)  # every page is there
"""
EXPORT = """
import sys
from trlpatch.export.gguf import export_gguf
export_gguf(sys.argv[1], sys.argv[2], sys.argv[3].split(","), tokenizer_pre="qwen2", verify=False)
"""
IMPORTS = "import torch, transformers, peft"


def make(folder: Path, layers: int) -> int:
    """Save a random model and a tokenizer; return the number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.words import byte_tokenizer

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer(["some words " * 50], vocabulary=300).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measured(code: str, *arguments: str) -> dict[str, float]:
    """Run code in a process, see `measured_command`."""
    return measured_command(sys.executable, "-W", "ignore", "-c", code, *arguments)


def measured_command(*command: str, errors: int | None = None) -> dict[str, float]:
    """Run a command; return its peak memory with that of its children, in MiB, wall and CPU seconds."""
    started = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    peak, spent = 0, {}
    while process.poll() is None:
        total = 0
        for one in [process, *_children(process)]:
            try:
                memory = one.memory_full_info()
                total += getattr(memory, "pss", memory.rss)  # pages that two of them map count once
                times = one.cpu_times()
                spent[one.pid] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"it ended with status {process.returncode}")
    return {
        "peak MiB": round(peak / 2**20),
        "seconds": round(time.monotonic() - started, 1),
        "CPU seconds": round(sum(spent.values()), 1),
    }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    """Print a line of JSON per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m", "f16,q8_0,q4_k_m"])
    parser.add_argument("--llama-quantize", metavar="PATH")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        parameters = make(folder, options.layers)
        print(json.dumps({"parameters": parameters}), flush=True)
        print(json.dumps({"what": "imports", **measured(IMPORTS)}), flush=True)
        print(json.dumps({"what": "load", **measured(LOAD, str(folder))}), flush=True)
        for types in options.types:
            out = Path(scratch) / types
            print(json.dumps({"what": types, **measured(EXPORT, str(folder), str(out), types)}), flush=True)
        if options.llama_quantize:
            full = Path(scratch) / "f32"
            print(json.dumps({"what": "f32", **measured(EXPORT, str(folder), str(full), "f32")}), flush=True)
            (source,) = full.rglob("*.gguf")
            for kind in ("q8_0", "q4_k_m"):
                words = (options.llama_quantize, str(source), str(Path(scratch) / f"{kind}.gguf"), kind, "1")
                found = measured_command(*words, errors=subprocess.DEVNULL)  # a line per tensor
                print(json.dumps({"what": f"llama-quantize {kind}", **found}), flush=True)


if __name__ == "__main__":
    main()
