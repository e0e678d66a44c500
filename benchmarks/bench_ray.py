"""GRPO with engines on GPUs of their own: Ray actors three ways, one GPU colocated and TRL's server beside them.

    PYTHONPATH=DIR/1.16.0 python benchmarks/bench_ray.py --shape 7b --gpus 2 --out ray.json
    python benchmarks/bench_ray.py --shape 7b --gpus 2 --tokens 1024 --steps 4 --out ray-1024.json
    python benchmarks/bench_ray.py --shape tiny --device cpu --tokens 16 --completions 8   # a smoke test
    python benchmarks/bench_ray.py --calibrate trlpatch/scale/calibration.json ray.json ray-1024.json       # no GPU

Ways, each in a process of its own, one after another, since each has all GPUs:

    colocated     FastLanguageModel with shared weights on one GPU: what the ratios refer to
    stock         TRL as it is, its engine on the trainer's GPU
    ray           engines on Ray actors on the other GPUs; trainer and engines wait for each other
    ray-prefetch  the next batch is generated while this one trains
    ray-async     AsyncGRPOTrainer on Ray engines, --staleness versions at most
    server        stock TRL with `trl vllm-serve` on the other GPUs
    probe         no training: calls, object store, and the engines' curve of batch sizes, for the calibration

Options behind a way as in bench_step.py: `ray+engine.enforce_eager=True`, `ray-async+config.token_budget=8192`.

Whole steps, from the end of one to the end of the next, after --warmup; medians, and every value in the JSON.
Generation and sync are the calls of the trainer, timed without waiting for the device: with prefetch and async they
lie beside the training and do not add up to a step. `to engines` is what an adapter takes to every engine, packed,
sent and taken. Tokens per second are those of completions that are trained on. Predicted is what trlpatch/scale says
of the same setting, with the calibration that is packaged: docs/scaling.md.

TRL's asynchronous trainer takes FlashAttention 3 from the hub. `--attention sdpa` puts torch's in its place, sequence
by sequence, for a machine without network: slower, and what ran is in the JSON.

An engine compiles and captures graphs when it starts, a minute at 7B. `--start graphs` captures decoding steps alone
and compiles nothing, `--start eager` neither: for all ways but the server, which has vLLM's own.

On a CPU the ways share two cores with each other's engines: that it runs is what is learned, no ratio. This script has
not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import ROOT, SHAPES, command_line, random_model, status_of
from benchmarks.ray_summary import calibrate, summary, table
from benchmarks.ray_ways import RAY_WAYS, Beside, parse, run
from benchmarks.step_timers import Lines
from benchmarks.step_ways import Order, environment
from tests.runs.judge import last_error

ON_CPU = "colocated,ray,probe"


def main() -> int:
    """Run each way, or calibrate; 1 when a way failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", help=f"comma-separated, of {', '.join(RAY_WAYS)}; by default all, on a CPU {ON_CPU}")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--gpus", type=int, default=2, help="one trains, the others generate")
    parser.add_argument("--staleness", type=int, default=4, help="of ray-async")
    parser.add_argument("--attention", choices=("flash", "sdpa"), default="flash", help="of ray-async, see below")
    parser.add_argument("--tokens", type=int, default=256, help="length of every completion")
    parser.add_argument("--completions", type=int, default=64, help="a step")
    parser.add_argument("--per-device", type=int, default=16, help="completions of one micro-batch")
    parser.add_argument("--generations", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0: full fine-tuning")
    parser.add_argument("--utilization", type=float, default=0.45, help="a colocated engine's share of its GPU")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--start", choices=("compiled", "graphs", "eager"), default="compiled", help="of engines, see below"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout", type=int, default=500, help="seconds a way")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "trlpatch-bench-models")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--logs", type=Path, help="a directory for what each way printed")
    parser.add_argument(
        "--calibrate", nargs="+", type=Path, metavar=("CALIBRATION", "RUN"), help="put what was measured into the file"
    )
    given = parser.parse_args()
    if given.calibrate:
        path, *runs = given.calibrate
        documents = [json.loads(one.read_text(encoding="utf-8")) for one in runs]
        text = json.dumps(calibrate(json.loads(path.read_text(encoding="utf-8")), documents), indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return 0
    cuda = given.device == "cuda"
    ways = (given.ways or (",".join(RAY_WAYS) if cuda else ON_CPU)).split(",")
    per_device = min(given.per_device, given.completions)
    try:
        for way in ways:
            parse(way, cuda)
        if given.completions % per_device or given.completions % given.generations:
            raise ValueError("--completions: expected a multiple of --per-device and of --generations")
        if cuda and given.gpus < 2 and {"ray", "server"} & {way.split("+")[0].split("-")[0] for way in ways}:
            raise ValueError("--gpus: expected 2 or more, one trains and the others generate")
    except ValueError as error:
        parser.error(str(error))
    order = Order(
        model=str(random_model(given.shape, given.models.resolve(), cuda=cuda)), tokens=given.tokens,
        completions=given.completions, per_device=per_device, generations=given.generations, rank=given.rank,
        sleep=False, utilization=given.utilization, warmup=given.warmup, steps=given.steps, parts=0,
        learning_rate=given.learning_rate, cuda=cuda,
    )  # fmt: skip
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(sys.argv[1:], script="bench_ray.py"),
        "gpus": given.gpus, "shape": given.shape, "staleness": given.staleness, "attention": given.attention,
        "start": given.start, "settings": {**asdict(order), "model": given.shape}, "results": [],
    }  # fmt: skip
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
    beside = Beside(given.gpus, given.staleness, given.attention == "sdpa" or not cuda, given.start)
    for number, way in enumerate(ways):
        log = given.logs and (given.logs / f"{number}-{way.split('+')[0]}.log").resolve()
        result = measure(way, order, beside, given.timeout, log)
        document["results"].append(result)
        print("RESULT", json.dumps({name: result[name] for name in result if name != "steps"}), flush=True)
        if given.out:
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document), flush=True)
    return int(any("error" in result for result in document["results"]))


def measure(way: str, order: Order, beside: Beside, timeout: int, log: Path | None) -> dict[str, Any]:
    """Run one way in a process of its own; what it reported before it failed is kept, with the error."""
    devices = {} if not order.cuda else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(beside.gpus)))}
    if way.split("+")[0] in ("colocated", "stock") and order.cuda:
        devices = {"CUDA_VISIBLE_DEVICES": "0"}
    environ = {
        **os.environ, **environment(parse(way, order.cuda), order), **devices,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as scratch:
        events, printed = Path(scratch) / "events.jsonl", log or Path(scratch) / "log"
        asked = json.dumps({"way": way, "order": asdict(order), "beside": asdict(beside)})
        command = [sys.executable, str(Path(__file__).resolve()), "--child", asked, str(events)]
        # Time to end its actors or its server.
        status = status_of(command, environ, Path(scratch), printed, timeout, patience=60)
        found = summary(way, order, Lines.read(events))
        if status != 0:
            said = last_error(printed.read_text(encoding="utf-8", errors="replace"))
            found["error"] = said if status is not None else f"no end after {timeout} s; last: {said}"
        return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child = json.loads(sys.argv[2])
        lines = Lines(Path(sys.argv[3]))
        run(child["way"], Order(**child["order"]), Beside(**child["beside"]), lines)
    else:
        sys.exit(main())
