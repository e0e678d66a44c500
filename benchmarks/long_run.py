"""A long GRPO run with trouble in it: what a process holds stays flat, and a checkpoint leads to the same rollouts.

    PYTHONPATH=DIR/1.16.0 python benchmarks/long_run.py run --device cpu --out long.json     # a tiny model
    PYTHONPATH=DIR/1.16.0 python benchmarks/long_run.py run --steps 60 --seconds 240 --out long.json    # CUDA
    python benchmarks/long_run.py draw long.json long.svg     # needs matplotlib; prints the table again

A PEFT adapter is trained on a real engine in this process; on CUDA base weights are shared and the engine sleeps while
the trainer trains. There is an evaluation every 15th of the run and a checkpoint every 6th. At two fifths SIGINT
arrives in the middle of a rollout, and the same trainer goes on from its last checkpoint; at three fifths the reward
function raises, and a new trainer on the same model does. So about a third more steps are trained than `--steps` says.

After each step the process is looked at: memory, adapters and requests in vLLM, descriptors, files, threads, tensors.
The table has the slope of each series over the last two thirds, in 100 steps. What is above long_samples.py's bound
GROWS, and the status is 1.

Then a new process resumes from the last checkpoint and rolls out once. Nobody seeds anything for it: transformers
restores torch's generators, and vLLM samples with them. Its token ids must be those of the first process's next step;
and so must be those that the first process itself sampled again, after its trouble. On CUDA the difference is reported
and not judged: kernels may add in another order.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import command_line, random_model
from benchmarks.long_samples import SERIES, Trend, trends
from benchmarks.long_training import Order, resume, train
from benchmarks.step_timers import Lines
from tests import ports
from tests.runs.judge import last_error

ROOT = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
ENVIRONMENT_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TRAINING_SHARE = 0.6
"""Of `--seconds`; the rest is for loading twice and the resumed step."""


def main() -> int:
    """Do what the command line says; 1 when a series grows, a rollout differs or a process failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    running.add_argument("--shape", choices=("tiny", "0.5b", "1.5b", "7b"), help="tiny on a CPU, else 0.5b")
    running.add_argument("--steps", type=int, default=300)
    running.add_argument("--tokens", type=int, default=16, help="length of a completion at most")
    running.add_argument("--completions", type=int, default=16, help="a step")
    running.add_argument("--generations", type=int, default=8, help="completions of one prompt")
    running.add_argument("--rank", type=int, default=16)
    running.add_argument("--eager", action="store_true", help="on CUDA: no graphs, so the engine starts sooner")
    running.add_argument("--seconds", type=int, default=3600, help="stop training in time to end within so many")
    running.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "trlpatch-bench-models")
    running.add_argument("--out", type=Path, required=True, help="JSON")
    drawing = commands.add_parser("draw")
    drawing.add_argument("document", type=Path)
    drawing.add_argument("picture", type=Path)
    given = parser.parse_args()
    if given.command == "draw":
        document = json.loads(given.document.read_text(encoding="utf-8"))
        draw(document, given.picture)
        print(table(document))
        return 0
    document = run(given)
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document), flush=True)
    return int(failed(document))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Run both processes and gather what they reported, also of one that failed."""
    started = time.perf_counter()
    cuda = given.device == "cuda"
    model = random_model(given.shape or ("0.5b" if cuda else "tiny"), given.models.resolve(), cuda=cuda)
    with tempfile.TemporaryDirectory() as scratch:
        order = Order(
            model=str(model), out=str(Path(scratch) / "out"), steps=given.steps,
            eval_every=max(1, given.steps // 15), save_every=max(1, given.steps // 6),
            interrupt=given.steps * 2 // 5, fail=given.steps * 3 // 5, tokens=given.tokens,
            completions=given.completions, generations=given.generations, rank=given.rank,
            seconds=given.seconds * TRAINING_SHARE, cuda=cuda, eager=given.eager,
        )  # fmt: skip
        events, error = child(["train", order.as_json()], Path(scratch), given.seconds)
        document: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": command_line(sys.argv[1:], script="long_run.py"),
            "settings": {**json.loads(order.as_json()), "model": model.name, "out": ""},
            "samples": [event["sample"] for event in events if event["event"] == "step"],
            "disturbed": [event for event in events if event["event"] == "disturbed"],
        }
        for event in events:
            document |= {key: event[key] for key in ("versions", "device", "grown", "seconds") if key in event}
        if error:
            return {**document, "error": error}
        try:
            at, attempt = compared(order)
        except ValueError as none:  # what was sampled is worth having
            return {**document, "error": str(none)}
        left = max(60, given.seconds - (time.perf_counter() - started))
        _, error = child(["resume", order.as_json(), f"{order.out}/checkpoint-{at}"], Path(scratch), left)
        if error:
            return {**document, "error": error}
        texts = {path: json.loads(path.read_text()) for path in Path(order.out).glob(f"rollout-{at}-*.json")}
        document["rollouts"] = [
            {"after": at, "of": f"the new process, beside {attempt}",
             **same(texts[order.rollout_file(at, attempt)], texts[order.rollout_file(at, "new-process")])},
            *again(order),
        ]  # fmt: skip
    document["total_seconds"] = time.perf_counter() - started
    return document


def child(words: list[str], scratch: Path, timeout: float) -> tuple[list[dict[str, Any]], str | None]:
    """Run this file with `words` in another process: its events, and its error if it failed."""
    events, log, temporary = (scratch / f"{words[0]}-{name}" for name in ("events", "log", "tmp"))
    temporary.mkdir()
    environ = {
        **(ENVIRONMENT_CPU if json.loads(words[1])["cuda"] is False else {}),
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)])),
        **ports.environment(),
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(events), *words]
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, env=environ, cwd=scratch, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False
            )
            error = None if done.returncode == 0 else said(log)
        except subprocess.TimeoutExpired:
            tail = log.read_text(encoding="utf-8", errors="replace")[-300:]
            error = f"{words[0]}: no end after {timeout:.0f} s: {tail}"
    return Lines.read(events), error


def said(log: Path) -> str:
    """Return the error that a process ended with, without what nanobind says when modules are unloaded."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return last_error("\n".join(line for line in lines if not line.startswith((" - leaked", "nanobind", "See https"))))


def compared(order: Order) -> tuple[int, str]:
    """Return the last checkpoint that the first process went on from, and in which attempt it did last.

    Raises:
        ValueError: it went on from none: too few steps.
    """
    files = sorted(Path(order.out).glob("rollout-*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{order.steps} steps, a checkpoint every {order.save_every}: none was trained on from")
    _, step, attempt = files[-1].stem.split("-", 2)
    return int(step), attempt


def again(order: Order) -> list[dict[str, Any]]:
    """Compare what the first process sampled twice after the same checkpoint: before its trouble, and after it."""
    found = []
    for path in sorted(Path(order.out).glob("rollout-*-resumed-checkpoint-*.json")):
        _, step, attempt = path.stem.split("-", 2)
        before = [other for other in Path(order.out).glob(f"rollout-{step}-*.json") if _older(other, path)]
        if before and attempt == f"resumed-checkpoint-{step}":
            first = json.loads(min(before, key=lambda other: other.stat().st_mtime).read_text())
            of = "the same process, before and after its trouble"
            found.append({"after": int(step), "of": of, **same(first, json.loads(path.read_text()))})
    return found


def _older(other: Path, path: Path) -> bool:
    return other.stat().st_mtime_ns < path.stat().st_mtime_ns


def same(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Compare two rollouts: all prompts, and each completion's token ids."""
    pairs = list(zip(one["tokens"], other["tokens"], strict=False))
    return {
        "prompts_equal": [a[0] for a in one["tokens"]] == [b[0] for b in other["tokens"]],
        "completions": len(one["tokens"]),
        "completions_equal": sum(a[1] == b[1] for a, b in pairs),
        "with_adapter": one["adapter"] and other["adapter"],
    }


def differ(rollout: dict[str, Any]) -> bool:
    """Tell whether two rollouts are not the same in any respect."""
    equal = rollout["completions_equal"] == rollout["completions"]
    return not (equal and rollout["prompts_equal"] and rollout["with_adapter"])


def failed(document: dict[str, Any]) -> bool:
    """Tell whether a process failed, a series grows, or (on a CPU) a rollout differs."""
    cuda = document["settings"]["cuda"]
    if "error" in document or not document["samples"]:
        return True
    grows = any(found.verdict == "GROWS" for found in trends(document["samples"], cuda=cuda).values())
    return grows or any(differ(rollout) for rollout in document["rollouts"] if not cuda or not rollout["with_adapter"])


def table(document: dict[str, Any]) -> str:
    """Write what was found as Markdown."""
    found = trends(document["samples"], cuda=document["settings"]["cuda"])
    lines = ["| series | early | late | slope in 100 steps | flat up to | |", "|---|---|---|---|---|---|"]
    lines += [f"| {one.title} | {_row(found[one.key])} |" for one in SERIES if one.key in found]
    steps, device = len(document["samples"]), document.get("device", "no device")
    lines += ["", f"{steps} steps on {device}; early, late: the first and last tenth of the last two thirds."]
    lines += [f"- {event['kind']} in step {event['step'] + 1}" for event in document["disturbed"]]
    for rollout in document.get("rollouts", ()):
        share = f"{rollout['completions_equal']} of {rollout['completions']} completions have the same token ids"
        prompts = "" if rollout["prompts_equal"] else "; THE PROMPTS DIFFER"
        adapter = "" if rollout["with_adapter"] else "; WITHOUT THE ADAPTER"
        lines.append(f"- Step {rollout['after'] + 1} of {rollout['of']}: {share}{prompts}{adapter}")
    if "total_seconds" in document:
        lines.append(f"- {document['total_seconds']:.0f} s in all")
    if "error" in document:
        lines.append(f"- FAILED: {document['error']}")
    return "\n".join(lines)


def _row(trend: Trend) -> str:
    numbers = [trend.early, trend.late, trend.slope, *([] if trend.allowed is None else [trend.allowed])]
    written = [_number(value) for value in numbers] + ["-"] * (4 - len(numbers))
    return " | ".join([*written, trend.verdict])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw every series over the steps, each with its trend's verdict and the disturbances."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("svg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    matplotlib.rcParams.update({"svg.hashsalt": "trlpatch", "svg.fonttype": "none", "font.size": 8})
    samples = document["samples"]
    found = trends(samples, cuda=document["settings"]["cuda"])
    shown = [series for series in SERIES if series.key in found]
    # A run that resumed has trained some steps twice: there the trainer's own count goes back.
    troubles = [after["trained"] - 0.5 for before, after in pairwise(samples) if after["step"] <= before["step"]]
    columns = 4
    rows = math.ceil(len(shown) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(11, 1.7 * rows), sharex=True, squeeze=False)
    for series, axes in zip(shown, grid.flat, strict=False):
        points = [(sample["trained"], sample[series.key]) for sample in samples if series.key in sample]
        axes.plot(*zip(*points, strict=True), linewidth=0.9)
        axes.axvspan(0, samples[-1]["trained"] / 3, color="0.93", linewidth=0)
        for at in troubles:
            axes.axvline(at, color="tab:red", linewidth=0.7, linestyle=":")
        axes.set_title(f"{series.title}: {found[series.key].verdict}", fontsize=7.5, loc="left")
        top = max(value for _, value in points)
        axes.set_ylim(0, 1.15 * top if top else 1)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("steps trained; dotted: an interrupted rollout, a failed reward", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        lines = Lines(Path(sys.argv[2]))
        order = Order(**json.loads(sys.argv[4]))
        if sys.argv[3] == "train":
            train(order, lines)
        else:
            resume(order, Path(sys.argv[5]), lines)
    else:
        sys.exit(main())
