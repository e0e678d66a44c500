"""GRPO on two ranks: data parallel, sharded, and one engine over both; each beside what it is compared with.

    PYTHONPATH=DIR/1.16.0 python benchmarks/bench_ranks.py --parts ddp,fsdp2,tp --out ranks.json
    python benchmarks/bench_ranks.py --shape tiny --device cpu --tokens 16 --completions 8   # a smoke test

Parts, and the cases of each; every rank of a case is a process of its own:

    ddp     ddp-1, ddp-2: GRPO by FastLanguageModel on one rank and on two, the same batch on each rank
    fsdp2   fsdp2-stock, fsdp2-trlpatch: what takes an adapter that FSDP2 shards to an engine on each rank. Stock
            merges, pushes every weight and unmerges; patched the adapter is gathered and handed over
    zero3   the same under DeepSpeed ZeRO-3, where DeepSpeed can be imported; not by default
    tp      tp-1, tp-2: generation of 64 sequences by an engine on one GPU and by one over two ranks
            (external_launcher), without and with the live adapter

`--shape` is that of fsdp2, zero3 and tp, `--ddp-shape` that of ddp. Cases of one rank run first, beside each other
where there are GPUs for it; those of two ranks run alone, one after another. A case that fails or is not done after
--timeout seconds is ended with all its ranks, and its error is in the JSON; the others stay.

ddp: whole steps as in bench_step.py, medians of rank 0. fsdp2, zero3: every hand-over of --hand-overs training steps
but the first, waited for on both sides after a barrier; the slower rank counts. `peak` is the most that torch has
allocated on the rank during one, engine included, `rise` what of it was not there before. tp: medians of three calls.
Engines capture graphs of decoding steps and compile nothing (`--start compiled`: as vLLM does by itself); those of
fsdp2 and zero3, whose speed is not measured, are eager. What TRL logs as the difference of log-probabilities, or the
gap measured after generation, says whether the engine has the policy.

On a CPU ranks share two cores and stock's push fails: that it runs is what is learned, no ratio. This script has not
run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import ROOT, SHAPES, command_line, random_model
from benchmarks.ranks_summary import aims, summary, table
from benchmarks.ranks_ways import RANKS, Case, environment, run
from benchmarks.step_timers import Lines
from benchmarks.step_ways import Order, Way
from benchmarks.step_ways import environment as step_environment
from tests import ports
from tests.runs.judge import last_error

PARTS = ("ddp", "fsdp2", "zero3", "tp")
GRACE = 15.0
"""Seconds that the other ranks have to end by themselves once one has ended or is late."""


def main() -> int:
    """Run the cases; 1 when one failed that is not stock's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="ddp,fsdp2,tp", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--cases", help=f"instead of --parts, of {', '.join(RANKS)}")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of fsdp2, zero3 and tp")
    parser.add_argument("--ddp-shape", choices=SHAPES, help="1.5b, or tiny with a tiny --shape")
    parser.add_argument("--tokens", type=int, default=256, help="length of every completion")
    parser.add_argument("--completions", type=int, default=64, help="a step of a rank, of ddp")
    parser.add_argument("--per-device", type=int, default=16, help="completions of one micro-batch")
    parser.add_argument("--generations", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--utilization", type=float, default=0.4, help="an engine's share of its GPU")
    parser.add_argument("--warmup", type=int, default=3, help="steps of ddp")
    parser.add_argument("--steps", type=int, default=5, help="of ddp")
    parser.add_argument("--hand-overs", type=int, default=6, help="of fsdp2 and zero3")
    parser.add_argument("--start", choices=("graphs", "compiled", "eager"), default="graphs", help="of engines")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout", type=int, default=150, help="seconds a case")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "trlpatch-bench-models")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--logs", type=Path, help="a directory for what each rank printed")
    given = parser.parse_args()
    names = given.cases.split(",") if given.cases else cases_of(given.parts.split(","))
    if unknown := [name for name in names if name not in RANKS]:
        known = f"expected --parts of {', '.join(PARTS)}, or --cases of {', '.join(RANKS)}"
        parser.error(f"{', '.join(unknown)}: {known}")
    per_device = min(given.per_device, given.completions)
    if given.completions % per_device or given.completions % given.generations:
        parser.error("--completions: expected a multiple of --per-device and of --generations")
    cuda, models = given.device == "cuda", given.models.resolve()
    shapes = {"ddp": given.ddp_shape or ("tiny" if given.shape == "tiny" else "1.5b")}
    shared = Order(
        model="", tokens=given.tokens, completions=given.completions, per_device=per_device,
        generations=given.generations, rank=given.rank, sleep=False, utilization=given.utilization,
        warmup=given.warmup, steps=given.steps, parts=0, learning_rate=1e-3, cuda=cuda,
    )  # fmt: skip
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(sys.argv[1:], script="bench_ranks.py"),
        "shapes": {part: shapes.get(part, given.shape) for part in PARTS},
        "start": given.start, "settings": asdict(shared), "results": [],
    }  # fmt: skip
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)

    def one(name: str, devices: str | None) -> dict[str, Any]:
        case = Case(name, given.start)
        shape = document["shapes"][case.part]
        order = replace(shared, model=str(random_model(shape, models, cuda=cuda)))
        if case.part in ("fsdp2", "zero3"):  # a small batch: the hand-over is what counts
            size = given.generations
            order = replace(order, tokens=16, completions=size, per_device=size, warmup=1, steps=given.hand_overs - 1)
        return measure(case, order, devices, given.timeout, given.logs and given.logs.resolve())

    for part in dict.fromkeys(Case(name, "").part for name in names):  # once, before anything is timed
        random_model(document["shapes"][part], models, cuda=cuda)
    for result in each(names, one, cuda=cuda):
        document["results"].append(result)
        document["aims"] = aims(document["results"])
        print("RESULT", json.dumps({key: result[key] for key in result if key != "ranks"}), flush=True)
        if given.out:
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document), flush=True)
    return int(any("error" in result for result in document["results"] if not result["case"].endswith("stock")))


def cases_of(parts: list[str]) -> list[str]:
    """Return the cases of some parts; an unknown part stands for itself."""
    found: list[str] = []
    for part in parts:
        found += [name for name in RANKS if part == Case(name, "").part] or [part]
    return found


def each(names: list[str], one: Callable[[str, str | None], dict[str, Any]], *, cuda: bool) -> Any:
    """Yield the result of each case: those of one rank beside each other on GPUs of their own, then the others."""
    alone = [name for name in names if RANKS[name] == 1]
    cards: SimpleQueue[str | None] = SimpleQueue()
    for card in ("0", "1") if cuda else (None,):
        cards.put(card)

    def on_a_card(name: str) -> dict[str, Any]:
        card = cards.get()
        try:
            return one(name, card)
        finally:
            cards.put(card)

    with ThreadPoolExecutor(2 if cuda else 1) as pool:
        yield from pool.map(on_a_card, alone)
    for name in names:
        if name not in alone:
            yield one(name, "0,1" if cuda else None)


def measure(case: Case, order: Order, devices: str | None, timeout: float, logs: Path | None) -> dict[str, Any]:
    """Run one case, each rank in a process of its own; what was reported before it failed is kept, with the error."""
    if case.part == "zero3" and importlib.util.find_spec("deepspeed") is None:
        return {"case": case.name, "error": "DeepSpeed cannot be imported"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        # Ranks meet at one MASTER_PORT; what else each of their engines opens is its own.
        blocks = [ports.environment() for _ in range(case.ranks)]
        start = partial(_start, case, order, devices, folder, blocks[0]["MASTER_PORT"])
        printed = [(logs or folder) / f"{case.name}-{rank}.log" for rank in range(case.ranks)]
        began = time.monotonic()
        statuses = wait_for([start(rank, block["VLLM_PORT"], log) for rank, (block, log) in
                             enumerate(zip(blocks, printed, strict=True))], timeout)  # fmt: skip
        ranks = [Lines.read(folder / f"rank{rank}.jsonl") for rank in range(case.ranks)]
        found = summary(case, order, ranks) | {"wall_s": round(time.monotonic() - began, 1)}
        errors = [
            f"rank {rank}: {'no end after ' + format(timeout, 'g') + ' s; last: ' if status is None else ''}"
            + last_error(log.read_text(encoding="utf-8", errors="replace"))
            for rank, (status, log) in enumerate(zip(statuses, printed, strict=True))
            if status != 0
        ]
        if errors:
            found["error"] = "; ".join(errors)
        return found


def _start(
    case: Case, order: Order, devices: str | None, folder: Path, master: str, rank: int, port: str, log: Path
) -> subprocess.Popen[bytes]:
    environ = {
        **os.environ, **step_environment(Way(case.name, "drop-in"), order), "MASTER_PORT": master, "VLLM_PORT": port,
        **environment(case, rank, devices, folder),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *_absolute(os.environ.get("PYTHONPATH", ""))])),
    }  # fmt: skip
    asked = json.dumps({"case": asdict(case), "order": asdict(order)})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", asked, str(folder / f"rank{rank}.jsonl")]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environ, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _absolute(paths: str) -> list[str]:
    return [str(Path(path).resolve()) for path in paths.split(os.pathsep) if path]


def wait_for(children: list[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Wait for all; once one has failed, or it is late, end the others. Statuses, None for one that was ended here."""
    deadline, statuses = time.monotonic() + timeout, [child.poll() for child in children]
    try:
        while None in statuses and time.monotonic() < deadline:
            time.sleep(0.2)
            statuses = [child.poll() for child in children]
            if any(statuses):  # a rank alone waits for ever in its next collective
                deadline = min(deadline, time.monotonic() + GRACE)
        return statuses
    finally:
        for child in children:  # and what it has started, which is of its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child = json.loads(sys.argv[2])
        status = 0
        try:
            run(Case(**child["case"]), Order(**child["order"]), Lines(Path(sys.argv[3])))
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # torch has no safe way to end a process with a process group, see tests/cpu/ranks.py
    sys.exit(main())
