"""GRPO with engines on GPUs of their own: Ray actors three ways, one GPU colocated and TRL's server beside them.

    PYTHONPATH=DIR/1.16.0 python benchmarks/bench_ray.py --shape 7b --gpus 2 --out ray.json
    python benchmarks/bench_ray.py --shape 7b --gpus 2 --tokens 1024 --steps 4 --out ray-1024.json
    python benchmarks/bench_ray.py --shape 7b --gpus 8 --trainers 4 --out ray-4-4.json
    python benchmarks/bench_ray.py --shape 7b --gpus 8 --ways probe+engine.num_engines=1,probe+engine.num_engines=4
    python benchmarks/bench_ray.py --shape tiny --device cpu --tokens 16 --completions 8   # a smoke test
    python benchmarks/bench_ray.py --calibrate trlpatch/scale/calibration.json ray.json ray-1024.json       # no GPU

Ways, each in a process of its own, one after another, since each has all GPUs:

    colocated     FastLanguageModel with shared weights on each trainer's GPU: what the ratios refer to
    stock         TRL as it is, its engine on the trainer's GPU
    ray           engines on Ray actors on the other GPUs; trainer and engines wait for each other
    ray-prefetch  the next batch is generated while this one trains
    ray-async     AsyncGRPOTrainer on Ray engines, --staleness versions at most
    server        stock TRL with `trl vllm-serve` on the other GPUs
    probe         no training: calls, object store, and the engines' curve of batch sizes, for the calibration

Options behind a way as in bench_step.py: `ray+engine.enforce_eager=True`, `ray-async+config.token_budget=8192`;
`ray+engine.tensor_parallel_size=2` makes half as many engines.

With `--trainers T` so many ranks train by DDP on the first T GPUs, the same batch on each, and the engines are divided
among them (`ray`) or are all the first rank's (`ray-async`). They share a Ray cluster that has the other GPUs, in a
process of its own. Prefetch has one trainer.

Whole steps, from the end of one to the end of the next, after --warmup; medians, and every value in the JSON. `cpu s`
is what the trainer's process had of cores in one, which other work on the machine changes less.
Generation and sync are the calls of the trainer, timed without waiting for the device: with prefetch and async they
lie beside the training and do not add up to a step. `to engines` is what an adapter takes to every engine, packed,
sent and taken. Tokens per second are those of completions that are trained on; those of an engine are what it has
sampled while the timed steps went on, beside training included. Predicted is what trlpatch/scale says of the same
setting, with the calibration that is packaged: docs/scaling.md. `logp difference` is TRL's own, a median of the steps;
`gap` is taken after training and a last hand-over, its control are the same completions beside the policy without the
adapter. GiB are the most of torch's allocator in a trainer, engines in its process included, and what the fullest GPU
of an engine of its own has in use; on a CPU of the process's resident set.

TRL's asynchronous trainer takes FlashAttention 3 from the hub. `--attention sdpa` puts torch's in its place, sequence
by sequence, for a machine without network: slower, and what ran is in the JSON.

An engine compiles and captures graphs when it starts, a minute at 7B. `--start graphs` captures decoding steps alone
and compiles nothing, `--start eager` neither: for all ways but the server, which has vLLM's own.

On a CPU the ways share two cores with each other's engines: that it runs is what is learned, no ratio. On GPUs
colocated and ray-prefetch have run: docs/many-gpus.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import ROOT, SHAPES, command_line, random_model
from benchmarks.launch import absolute, end_all_when_terminated, run_ranks
from benchmarks.ray_cluster import head
from benchmarks.ray_summary import aims, calibrate, summary, table
from benchmarks.ray_ways import RAY_WAYS, Beside, parse, run
from benchmarks.step_timers import Lines
from benchmarks.step_ways import Order, environment

PATIENCE = 60.0
"""Seconds for a way that is late to end its actors or its server."""


def main() -> int:
    """Run each way, or calibrate; 1 when a way failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", help=f"comma-separated, of {', '.join(RAY_WAYS)}; by default all that can run")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--gpus", type=int, default=2, help="trainers' and engines'; on a CPU their processes")
    parser.add_argument("--trainers", type=int, default=1, help="ranks that train")
    parser.add_argument("--staleness", type=int, default=4, help="of ray-async")
    parser.add_argument("--attention", choices=("flash", "sdpa"), default="flash", help="of ray-async, see below")
    parser.add_argument("--tokens", type=int, default=256, help="length of every completion")
    parser.add_argument("--completions", type=int, default=64, help="a step of a trainer")
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
    end_all_when_terminated()
    if given.calibrate:
        path, *runs = given.calibrate
        documents = [json.loads(one.read_text(encoding="utf-8")) for one in runs]
        text = json.dumps(calibrate(json.loads(path.read_text(encoding="utf-8")), documents), indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return 0
    cuda = given.device == "cuda"
    ways = given.ways.split(",") if given.ways else ways_of(given.trainers, cuda=cuda)
    beside = Beside(given.gpus, given.staleness, given.attention == "sdpa" or not cuda, given.start, given.trainers)
    per_device = min(given.per_device, given.completions)
    try:
        for way in ways:
            fits(way, beside, cuda=cuda)
        if given.completions % per_device or given.completions % given.generations:
            raise ValueError("--completions: expected a multiple of --per-device and of --generations")
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
        "gpus": given.gpus, "trainers": given.trainers,
        "shape": given.shape, "staleness": given.staleness, "attention": given.attention,
        "start": given.start, "settings": {**asdict(order), "model": given.shape}, "results": [],
    }  # fmt: skip
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
    for number, way in enumerate(ways):
        result = measure(way, order, beside, given.timeout, given.logs and given.logs.resolve(), number)
        document["results"].append(result)
        document["aims"] = aims(document)
        print(
            "RESULT",
            json.dumps({name: result[name] for name in result if name not in ("steps", "versions")}),
            flush=True,
        )
        if given.out:
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document), flush=True)
    return int(any("error" in result for result in document["results"]))


def ways_of(trainers: int, *, cuda: bool) -> list[str]:
    """Return the ways that can run: on a CPU no server, with several trainers no prefetch and no probe."""
    left_out = {*(() if cuda else ("server",)), *(("ray-prefetch", "probe") if trainers > 1 else ())}
    return [way for way in RAY_WAYS if way not in left_out]


def fits(spec: str, beside: Beside, *, cuda: bool) -> None:
    """See that a way can run on so many trainers and GPUs.

    Raises:
        ValueError: it cannot, or nothing is called so.
    """
    way = parse(spec, cuda)
    name = spec.split("+")[0]
    if beside.trainers < 1:
        raise ValueError(f"--trainers {beside.trainers}: expected 1 or more")
    if beside.trainers > 1 and name in ("ray-prefetch", "probe"):
        raise ValueError(f"way {name!r}: expected --trainers 1, found {beside.trainers}")
    if name not in ("colocated", "stock"):
        beside.engines(way, every_rank=name == "ray")


def measure(way: str, order: Order, beside: Beside, timeout: float, logs: Path | None, number: int) -> dict[str, Any]:
    """Run one way, each trainer in a process of its own; what was reported is kept when one fails."""
    name, trainers = way.split("+")[0], beside.trainers
    environ = {
        **os.environ, **environment(parse(way, order.cuda), order),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *absolute(os.environ.get("PYTHONPATH", ""))]),
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
    }  # fmt: skip
    environ.pop("RAY_ADDRESS", None)
    cards = [str(card) for card in range(beside.gpus)] if order.cuda else []
    starts_ray = trainers == 1 and name not in ("colocated", "stock", "server")
    devices = ",".join(cards if starts_ray else cards[:trainers]) if order.cuda else None
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as scratch, ExitStack() as cluster:
        folder = Path(scratch)
        events = [folder / f"rank{rank}.jsonl" for rank in range(trainers)]
        asked = json.dumps({"way": way, "order": asdict(order), "beside": asdict(beside)})
        if trainers > 1 and name.startswith("ray"):
            engines = beside.gpus - trainers
            environ["RAY_ADDRESS"] = cluster.enter_context(head(engines, cards[trainers:], environ, folder))
        errors = run_ranks(
            lambda rank: [sys.executable, str(Path(__file__).resolve()), "--child", asked, str(events[rank])],
            trainers, devices, environ, folder,
            [(logs or folder) / f"{number}-{name}-{rank}.log" for rank in range(trainers)], timeout, PATIENCE,
        )  # fmt: skip
        found = summary(way, order, [Lines.read(one) for one in events])
        return found | ({"error": "; ".join(errors)} if errors else {})


def child(asked: dict[str, Any], events: Path) -> NoReturn:
    """Be one trainer, and end without destructors: torch has no safe way to end a process with a process group."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started is ended
    status = 0
    try:
        run(asked["way"], Order(**asked["order"]), Beside(**asked["beside"]), Lines(events))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), Path(sys.argv[3]))
    sys.exit(main())
