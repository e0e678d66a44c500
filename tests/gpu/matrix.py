"""Train every TRL release on CUDA devices, patched and stock, unattended, in the format of docs/matrix.json.

    python tests/gpu/matrix.py --stack tf5 --trl-root DIR --out RUNS.json --gpus 8
    python -m tests.matrix add docs/matrix.json RUNS.json

DIR holds unpacked TRL releases, one folder each. Each run is a process of its own with a device of its own (two for
ddp2) and writes its result at once; `--cases grpo-lora stock:grpo-full --releases 1.16.0` narrows the list, and what
is in RUNS.json already is not repeated. The cases are those of tests/runs/case.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import ports
from tests.gpu.common import DRIFT, TOLERANCE, random_model, run_child
from tests.matrix.runs import Run, load, write
from tests.runs.case import versions
from tests.runs.judge import judged
from trlpatch.source.releases import parse_release

CASE = Path(__file__).resolve().parents[1] / "runs" / "case.py"

MINORS = (
    "0.18.2 0.19.1 0.20.0 0.21.0 0.22.2 0.23.1 0.24.0 0.25.1 0.26.2 0.27.2 0.28.0 0.29.1 1.0.0 1.1.0 1.2.0 1.3.0 "
    "1.4.0 1.5.1 1.6.0 1.7.1 1.8.0 1.9.2 1.10.0 1.11.0 1.12.0 1.13.0 1.14.2 1.15.0 1.16.0"
)

FULL = "0.23.1 0.26.2 0.29.1 1.4.0 1.9.2 1.16.0"

PLAN = {
    "grpo-lora": MINORS,
    "stock:grpo-lora": MINORS,
    "grpo-full": FULL,
    "stock:grpo-full": FULL,
    "rloo-lora": "0.22.2 0.24.0 0.25.1 0.28.0 0.29.1 1.10.0 1.16.0",
    "online_dpo-lora": "0.18.2 0.23.1 0.26.2 0.28.0 1.1.0 1.11.0 1.16.0",
    "gold-lora": "0.25.1 0.26.2 1.0.0 1.10.0 1.16.0",
    "distillation-lora": "1.1.0 1.10.0 1.16.0",
    "sdpo-lora": "1.0.0 1.6.0 1.16.0",
    "sdft-lora": "1.6.0 1.16.0",
    "ssd-lora": "1.2.0 1.15.0",
    "iw_opd-lora": "1.9.2 1.16.0",
    "gfpo-lora": "0.24.0 0.28.0 0.29.1 1.7.1",
    "dppo-lora": "1.0.0 1.8.0",
    "grpo-own": "0.18.2 1.16.0",
    "grpo-liger": "0.18.2 0.23.1 0.29.1 1.16.0",
    "grpo-ddp2": "0.18.2 0.25.1 1.16.0",
}
"""Which releases run a case: GRPO on every minor, the others where the trainer has another shape than before."""


@dataclass(frozen=True)
class Job:
    case: str
    trl: str
    stock: bool

    @property
    def ranks(self) -> int:
        return 2 if self.case.endswith("-ddp2") else 1

    def __str__(self) -> str:
        return f"{'stock:' if self.stock else ''}{self.case}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", required=True, choices=("tf4", "tf5"))
    parser.add_argument("--trl-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--timeout", type=int, default=180, help="seconds a run")
    parser.add_argument("--budget", type=int, default=540, help="seconds after which no run is started")
    parser.add_argument("--cases", nargs="+", default=list(PLAN))
    parser.add_argument("--releases", nargs="+")
    given = parser.parse_args()
    runner = Runner(given)
    print(f"{'case':24}{'TRL':8}{'verdict':8}{'gap':>8}{'control':>9}  {'rewards':16}{'sleep':6}{'s':>4}  notes")
    with ThreadPoolExecutor(given.gpus) as pool:
        list(pool.map(runner.attempt, runner.jobs()))
    left = runner.left
    print(f"{len(runner.runs)} runs" + (f", left out for want of time: {', '.join(left)}" if left else ""))
    return int(any(run.verdict != "pass" for run in runner.runs if not run.stock))


class Runner:
    """Gives each job its devices, and keeps what comes out."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.started = time.monotonic()
        self.runs = load(given.out)
        self.left: list[str] = []
        self.versions = versions()
        self.model = random_model("0.1b")
        self.devices: queue.Queue[str] = queue.Queue()
        for device in range(given.gpus):
            self.devices.put(str(device))
        self._writing = threading.Lock()
        self._pairing = threading.Lock()

    def jobs(self) -> list[Job]:
        """What is to be run: first what takes two devices, then the patched runs, so that a cut costs least."""
        done = {(run.case, run.trl, run.stock) for run in self.runs}
        jobs = [job for job in self._planned() if (job.case, job.trl, job.stock) not in done]
        return sorted(jobs, key=lambda job: (-job.ranks, job.stock))

    def _planned(self) -> Iterator[Job]:
        for case in self.given.cases:
            for release in self.given.releases or PLAN[case].split():
                job = Job(case.removeprefix("stock:"), release, case.startswith("stock:"))
                if job.ranks <= self.given.gpus:
                    yield job

    def attempt(self, job: Job) -> None:
        if time.monotonic() - self.started > self.given.budget:
            self.left.append(f"{job} {job.trl}")
            return
        with self._pairing:  # two that wait for the second of their devices would wait for ever
            devices = [self.devices.get() for _ in range(job.ranks)]
        try:
            run = self._run(job, devices)
        finally:
            for device in devices:
                self.devices.put(device)
        with self._writing:
            self.runs.append(run)
            write(self.given.out, self.runs)
            print(row(job, run), flush=True)

    def _run(self, job: Job, devices: list[str]) -> Run:
        started = time.monotonic()
        order = {"case": job.case, "model": str(self.model), "steps": self.given.steps, "stock": job.stock}
        places = {"CUDA_VISIBLE_DEVICES": ",".join(devices), "MASTER_PORT": ports.environment()["MASTER_PORT"]}

        def rank(index: int) -> Any:
            ranks = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(job.ranks)}
            launched = {**ranks, "MASTER_ADDR": "localhost"} if job.ranks > 1 else {}
            launched["VLLM_PORT"] = ports.environment()["VLLM_PORT"]
            trl = self.given.trl_root / job.trl
            return run_child(CASE, [json.dumps(order)], trl=trl, timeout=self.given.timeout, **places, **launched)

        with ThreadPoolExecutor(job.ranks) as pool:
            results = list(pool.map(rank, range(job.ranks)))
        found = results[0].get("versions") or self.versions | {"trl": job.trl}
        command = f"python tests/gpu/matrix.py --stack {self.given.stack} --trl-root DIR --out RUNS.json"
        about = {
            "trl": job.trl,
            "case": job.case,
            "device": "gpu",
            "stack": self.given.stack,
            "versions": {name: text.partition("+")[0] for name, text in found.items() if name != "trl"},
            "date": datetime.date.today().isoformat(),
            "command": f"{command} --cases {job} --releases {job.trl}",
            "stock": job.stock,
            "seconds": round(time.monotonic() - started, 1),
        }
        return judged(results, about, steps=self.given.steps, tolerance=TOLERANCE, drift=DRIFT)


def row(job: Job, run: Run) -> str:
    head = f"{job!s:24}{run.trl:8}{run.verdict:8}"
    if run.gap_max is None:
        return f"{head}{run.seconds:.0f} s  {run.error[-300:]}"
    control = "" if run.control is None else f"{run.control:.3f}"
    rewards = "" if run.rewards is None else "{:.2f} -> {:.2f}".format(*run.rewards)
    return f"{head}{run.gap_max:8.4f}{control:>9}  {rewards:16}{run.sleep:6}{run.seconds:4.0f}  {run.note}"


if __name__ == "__main__":
    assert parse_release(MINORS.split()[-1]) == max(map(parse_release, MINORS.split()))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile vLLM and transformers anew
    os.environ.setdefault("PYTHONPYCACHEPREFIX", "/tmp/trlpatch-pycache")
    sys.exit(main())
