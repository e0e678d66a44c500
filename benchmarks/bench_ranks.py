"""GRPO on several ranks: data parallel, sharded, and one engine over some; each beside what it is compared with.

    PYTHONPATH=DIR/1.16.0 python benchmarks/bench_ranks.py --ranks 2 --out ranks.json
    PYTHONPATH=DIR/1.16.0 python benchmarks/bench_ranks.py --ranks 8 --parts ddp,fsdp2,zero3,tp,grpotp --out ranks.json
    python benchmarks/bench_ranks.py --shape tiny --device cpu --tokens 16 --completions 8        # a smoke test

Parts on N ranks, and the cases of each; every rank of a case is a process of its own:

    ddp     ddp-trlpatch-1, ddp-stock-N, ddp-trlpatch-N: GRPO, the same batch on each rank; patched it is loaded by
            FastLanguageModel
    fsdp2   fsdp2-stock-N, fsdp2-trlpatch-N: GRPO with an adapter that FSDP2 shards, to an engine on each rank. Stock
            merges, pushes every weight and unmerges; patched the adapter is gathered and handed over
    zero2   the same under DeepSpeed ZeRO-2, which shards gradients and optimizer and no parameter, where DeepSpeed can
            be imported
    zero3   the same under DeepSpeed ZeRO-3
    tp      tp-trlpatch-1, -2, and -4 with N of 4 or more: generation of 64 sequences by an engine on one GPU and by
            one over so many ranks (external_launcher), without and with the live adapter
    grpotp  grpotp-stock-2, grpotp-trlpatch-2, and -4: GRPO on so many ranks that have one engine

`--shape` is that of all but ddp, `--ddp-shape` that of ddp. Cases of one rank run first, beside each other where there
are GPUs for it; the others run alone, one after another. A case that fails or is not done after --timeout seconds is
ended with all its ranks, and its error is in the JSON; the others stay.

Steps are whole, medians of rank 0; `cpu s` is what its process had of cores in one, which other work on the machine
changes less than seconds; tokens per second are those of each engine while it generates. Of all parts but ddp and tp
every hand-over but the first is waited for on both sides after a barrier; the slowest rank counts. `peak` is the most
that torch has allocated on a rank during one, engine included, `rise` what of it was not there before; `GiB a rank`
is the most of the whole run, on a CPU the process's resident set. tp: medians of three calls. Engines capture graphs
of decoding steps and compile nothing (`--start compiled`: as vLLM does by itself).

`logp difference` is TRL's own, a median of the steps. `gap` is taken after training and a last hand-over, the largest
of all ranks; its control are the same completions beside the policy without the adapter: an engine that lacks it would
show so much.

On a CPU ranks share the cores: that it runs is what is learned, no ratio. zero2 has not run on a GPU yet, nor
any case on more than two: docs/many-gpus.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import ROOT, SHAPES, command_line, random_model
from benchmarks.launch import absolute, end_all_when_terminated, run_ranks
from benchmarks.ranks_summary import aims, summary, table
from benchmarks.ranks_ways import PARTS, Case, cases_of, run
from benchmarks.step_timers import Lines
from benchmarks.step_ways import Order, Way
from benchmarks.step_ways import environment as step_environment


def main() -> int:
    """Run the cases; 1 when one failed that is not stock's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, and GPUs")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--cases", help="instead of --parts and --ranks: names as in the table, comma-separated")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of all but ddp")
    parser.add_argument("--ddp-shape", choices=SHAPES, help="1.5b, or tiny with a tiny --shape")
    parser.add_argument("--tokens", type=int, default=256, help="length of every completion")
    parser.add_argument("--completions", type=int, default=64, help="a step of a rank")
    parser.add_argument("--per-device", type=int, default=16, help="completions of one micro-batch")
    parser.add_argument("--generations", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--utilization", type=float, default=0.4, help="an engine's share of its GPU")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--start", choices=("graphs", "compiled", "eager"), default="graphs", help="of engines")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout", type=int, default=400, help="seconds a case")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "trlpatch-bench-models")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--logs", type=Path, help="a directory for what each rank printed")
    given = parser.parse_args()
    end_all_when_terminated()
    try:
        names = given.cases.split(",") if given.cases else cases_of(given.parts.split(","), given.ranks)
        cases = [Case.named(name, given.start) for name in names]
    except ValueError as error:
        parser.error(str(error))
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
        "ranks": max(case.ranks for case in cases), "shapes": {part: shapes.get(part, given.shape) for part in PARTS},
        "start": given.start, "settings": asdict(shared), "results": [],
    }  # fmt: skip
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)

    def one(case: Case, devices: str | None) -> dict[str, Any]:
        shape = document["shapes"][case.part]
        order = replace(shared, model=str(random_model(shape, models, cuda=cuda)))
        return measure(case, order, devices, given.timeout, given.logs and given.logs.resolve())

    for part in dict.fromkeys(case.part for case in cases):  # once, before anything is timed
        random_model(document["shapes"][part], models, cuda=cuda)
    for result in each(cases, one, cuda=cuda):
        document["results"].append(result)
        document["aims"] = aims(document["results"])
        print("RESULT", json.dumps({key: result[key] for key in result if key != "ranks"}), flush=True)
        if given.out:
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document), flush=True)
    return int(any("error" in result for result in document["results"] if "-stock-" not in result["case"]))


def each(cases: list[Case], one: Callable[[Case, str | None], dict[str, Any]], *, cuda: bool) -> Any:
    """Yield the result of each case: those of one rank beside each other on GPUs of their own, then the others."""
    alone = [case for case in cases if case.ranks == 1]
    cards: SimpleQueue[str | None] = SimpleQueue()
    for card in range(max(case.ranks for case in cases)) if cuda else (None,):
        cards.put(None if card is None else str(card))

    def on_a_card(case: Case) -> dict[str, Any]:
        card = cards.get()
        try:
            return one(case, card)
        finally:
            cards.put(card)

    with ThreadPoolExecutor(cards.qsize()) as pool:
        yield from pool.map(on_a_card, alone)
    for case in cases:
        if case.ranks > 1:
            yield one(case, ",".join(map(str, range(case.ranks))) if cuda else None)


def measure(case: Case, order: Order, devices: str | None, timeout: float, logs: Path | None) -> dict[str, Any]:
    """Run one case, each rank in a process of its own; what was reported before it failed is kept, with the error."""
    if case.part in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        return {"case": case.name, "error": "DeepSpeed cannot be imported"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        environ = {
            **os.environ, **step_environment(Way(case.name, "drop-in"), order),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *absolute(os.environ.get("PYTHONPATH", ""))]),
        }  # fmt: skip
        asked = json.dumps({"case": asdict(case), "order": asdict(order)})
        events = [folder / f"rank{rank}.jsonl" for rank in range(case.ranks)]
        began = time.monotonic()
        errors = run_ranks(
            lambda rank: [sys.executable, str(Path(__file__).resolve()), "--child", asked, str(events[rank])],
            case.ranks, devices, environ, folder,
            [(logs or folder) / f"{case.name}-{rank}.log" for rank in range(case.ranks)], timeout,
        )  # fmt: skip
        found = summary(case, order, [Lines.read(one) for one in events])
        found["wall_s"] = round(time.monotonic() - began, 1)
        return found | ({"error": "; ".join(errors)} if errors else {})


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
