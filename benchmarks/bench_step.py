"""A whole GRPO step, and its parts, through stock TRL, trlpatch and a peer: same model, same batch, one table.

    PYTHONPATH=DIR/1.16.0 python benchmarks/bench_step.py --shape 7b --ways stock,trlpatch --out step.json
    python benchmarks/bench_step.py --shape tiny --device cpu --tokens 16 --completions 8   # a smoke test

Ways, each in a process of its own, because a device holds one engine at a time:

    stock              TRL as it is: it builds the engine, merges the adapter, pushes all weights, unmerges
    drop-in            the same script after PatchFastRL(): TRL builds the engine, the adapter is handed over
    trlpatch           FastLanguageModel; on CUDA engine and trainer share the base weights, or it is an error
    trlpatch-separate  FastLanguageModel with share_weights=False
    trlpatch-attached  an engine and a PEFT model of one's own, attach_engine
    unsloth            Unsloth's FastLanguageModel, where it is installed

Options are written behind a way, `trlpatch+adapter=request+engine.async_scheduling=True`: KEY=VALUE for PatchFastRL,
engine.KEY=VALUE for vLLM, config.KEY=VALUE for GRPOConfig, env.NAME=VALUE, and slow.PART=SECONDS, which delays every
call of a part to see that the table moves. `--options "A=1 B=2"` adds the way trlpatch+A=1+B=2. The first way is what
the ratios refer to.

Weights in place: `--ways stock,drop-in,drop-in+adapter=merge`, and `--rank 0 --ways stock,drop-in+adapter=off,drop-in`
for full fine-tuning.

How it is timed. A timer that waits for the device changes what it measures, so there are two sets of steps in one
process. Whole steps come first, with no method wrapped: after `--warmup` steps, `--steps` are timed, each from the end
of the one before to its own end, and the device is waited for at these ends only (TRL waits there anyway, to log its
loss). Then `--parts` steps run with every part wrapped and the device waited for at each boundary; step_timers.py says
what the parts are. Their sum is a little more than a whole step. Medians; the JSON file has every value.

What else is in the table: GiB allocated by torch at most while training; GiB of the device in use at most, read by the
parent from NVML; seconds to import, to load the model, to build the trainer (whichever builds the engine); the mean
length of completions, the same in all ways or the times cannot be compared; and TRL's mean difference between the
engine's and the trainer's log-probabilities of sampled tokens, which says whether rollouts come from the policy.
vLLM keeps compiled graphs in its cache: the first way of a fresh machine pays for them when it loads. On CPU stock
cannot be timed: vLLM's CPU backend packs the weights, and TRL's push finds nothing to load them into.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launch import end, end_all_when_terminated, start
from benchmarks.step_summary import add_ratios, summary, table
from benchmarks.step_timers import GIB, Lines
from benchmarks.step_ways import WAYS, Order, Way, as_json, environment, run
from tests import ports
from tests.runs.judge import last_error
from tests.runs.trainers import PROMPTS
from tests.words import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False},
    # Qwen2.5's, vocabulary included: the logits are a good part of a training step's time and memory.
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip

COMPILING = 6
"""Steps that Unsloth takes to compile, and that would not be medians of anything."""


def main() -> int:
    """Run each way; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="stock,trlpatch", help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--options", action="append", default=[], help="'KEY=VALUE ...': one more trlpatch way")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--tokens", type=int, default=256, help="length of every completion")
    parser.add_argument("--completions", type=int, default=64, help="a step")
    parser.add_argument("--per-device", type=int, default=16, help="completions of one micro-batch")
    parser.add_argument("--generations", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0: full fine-tuning, stock and drop-in")
    parser.add_argument("--sleep", choices=("on", "off"), default="off")
    parser.add_argument("--utilization", type=float, default=0.45, help="the engine's share of the device")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed as a whole")
    parser.add_argument("--parts", type=int, default=3, help="steps after these, timed in parts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="ways that run at once, each on a device of its own")
    parser.add_argument("--timeout", type=int, default=400, help="seconds a way")
    parser.add_argument("--path", action="append", default=[], help="WAY=DIR[:DIR]: in front of its PYTHONPATH")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "trlpatch-bench-models")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--logs", type=Path, help="a directory for what each way printed")
    given = parser.parse_args()
    end_all_when_terminated()
    try:
        ways = [Way.parse(spec) for spec in given.ways.split(",")]
        ways += [Way.parse("+".join(["trlpatch", *options.split()])) for options in given.options]
    except ValueError as error:
        parser.error(str(error))
    per_device = min(given.per_device, given.completions)
    if given.completions % per_device or given.completions % given.generations:
        parser.error("--completions: expected a multiple of --per-device and of --generations")
    order = Order(
        model=str(random_model(given.shape, given.models.resolve(), cuda=given.device == "cuda")), tokens=given.tokens,
        completions=given.completions, per_device=per_device, generations=given.generations, rank=given.rank,
        sleep=given.sleep == "on", utilization=given.utilization, warmup=given.warmup, steps=given.steps,
        parts=given.parts, learning_rate=given.learning_rate, cuda=given.device == "cuda",
    )  # fmt: skip
    paths = dict(text.split("=", 1) for text in given.path)
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(sys.argv[1:]),
        "gpus": given.gpus,
        "shape": given.shape,
        "settings": {**as_json(ways[0], order)["order"], "model": given.shape},
        "results": [],
    }
    cards: SimpleQueue[int] = SimpleQueue()
    for card in range(given.gpus):
        cards.put(card)

    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
    child = partial(measure, order=order, several=given.gpus > 1, timeout=given.timeout, paths=paths)

    def one(number: int, way: Way) -> dict[str, Any]:
        card = cards.get()
        try:
            return child(way, card=card, log=given.logs and (given.logs / f"{number}-{way.name}.log").resolve())
        finally:
            cards.put(card)

    with ThreadPoolExecutor(given.gpus) as pool:
        for result in pool.map(one, range(len(ways)), ways):
            document["results"].append(result)
            brief = {key: value for key, value in result.items() if key not in ("steps", "versions")}
            print("RESULT", json.dumps(brief), flush=True)
            add_ratios(document["results"])
            if given.out:
                given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document), flush=True)
    return int(any("error" in result for result in document["results"]))


def command_line(arguments: list[str], *, script: str = "bench_step.py") -> str:
    """Write the command down, files by their names: where they lie on this machine is nobody's matter."""
    names = [re.sub(r"(^|[=:])(?:~|\.{1,2})?/(?:[^/\s:=]+/)*", r"\1", word) for word in arguments]
    return shlex.join(["python", f"benchmarks/{script}", *names])


def random_model(shape: str, root: Path, *, cuda: bool) -> Path:
    """Save a random-weight Qwen2 and a tokenizer trained on the spot, once; return the directory.

    In a process of its own, so that this one holds no memory of the device.
    """
    directory = root / f"{shape}-{'bfloat16' if cuda else 'float32'}"
    if not (directory / "tokenizer.json").exists():
        command = [sys.executable, str(Path(__file__).resolve()), "--save", shape, str(directory), str(int(cuda))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory


def save_random_model(shape: str, directory: Path, *, cuda: bool) -> None:
    """See `random_model`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = byte_tokenizer(PROMPTS * 4, vocabulary=512)
    config = Qwen2Config(
        **SHAPES[shape], max_position_embeddings=8192, bos_token_id=None,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    words.save_pretrained(directory)  # last: it says that the directory is complete


def measure(
    way: Way, *, order: Order, card: int, several: bool, timeout: int, paths: dict[str, str], log: Path | None
) -> dict[str, Any]:
    """Run one way in a process of its own; what it reported before it failed is kept, with the error."""
    if way.name == "unsloth":
        order = Order(**{**as_json(way, order)["order"], "warmup": max(order.warmup, COMPILING)})
    places = ":".join([paths.get(way.spec, paths.get(way.name, "")), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {
        **os.environ,
        **environment(way, order),
        "PYTHONPATH": ":".join(str(Path(place).resolve()) for place in places.split(":") if place),
        **ports.environment(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if several:  # two processes that fill one cache of compiled graphs wait for each other
            environ |= {"CUDA_VISIBLE_DEVICES": str(card), "VLLM_CACHE_ROOT": str(folder / "vllm-cache")}
        events, log = folder / "events.jsonl", log or folder / "log"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--child",
            json.dumps(as_json(way, order)),
            str(events),
        ]
        device = DeviceMemory(card) if order.cuda else None
        status = status_of(command, environ, folder, log, timeout)
        used = device.stop() if device else []
        found = summary(way, order, Lines.read(events), used)
        if status != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = last_error("\n".join(line for line in lines if not line.startswith((" - leaked", "nanobind"))))
            found["error"] = said if status is not None else f"no end after {timeout} s; last: {said}"
        return found


def status_of(command: list[str], environ: dict[str, str], folder: Path, log: Path, timeout: float) -> int | None:
    """Run a process that prints into `log`; its exit status, or None if it was not done in time and was killed."""
    with log.open("w", encoding="utf-8") as file:
        child = start(command, env=environ, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        try:
            return child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(child)


class DeviceMemory:
    """GiB of a device that are in use, by whomever, read from NVML every 50 ms by a thread of this process."""

    def __init__(self, card: int) -> None:
        self._samples: list[tuple[float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(card,), daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[float, float]]:
        """Return (time, GiB)."""
        self._stopped.set()
        self._thread.join()
        return self._samples

    def _read(self, card: int) -> None:
        try:
            import pynvml  # type: ignore[import-not-found,unused-ignore]
        except ModuleNotFoundError:
            return
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else card)
        while not self._stopped.wait(0.05):
            self._samples.append((time.time(), pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--save"]:
        save_random_model(sys.argv[2], Path(sys.argv[3]), cuda=sys.argv[4] == "1")
    elif sys.argv[1:2] == ["--child"]:
        asked = json.loads(sys.argv[2])
        run(Way.parse(asked["way"]), Order(**asked["order"]), Lines(Path(sys.argv[3])))
    else:
        sys.exit(main())
