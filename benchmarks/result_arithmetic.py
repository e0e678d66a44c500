"""Does GRPO learn: a small model trained from scratch on additions, then GRPO, stock and patched, in one picture.

    PYTHONPATH=DIR/1.16.0 python benchmarks/result_arithmetic.py run --out result.json      # CUDA, some 4 minutes
    PYTHONPATH=DIR/1.16.0 python benchmarks/result_arithmetic.py run --device cpu --shape tiny --steps 6 --out cpu.json
    python benchmarks/result_arithmetic.py plot result.json result.svg       # needs matplotlib; prints the table again

A Qwen2 of random weights is trained on additions (arithmetic.py) until it solves `--until` of the held-out problems,
and saved. From that checkpoint each way trains a LoRA adapter by GRPO, reward 1 for the right sum, in a process of its
own:

    stock      TRL as it is, vLLM colocated: it builds the engine, merges the adapter, pushes all weights, unmerges
    drop-in    the same after PatchFastRL(): TRL builds the engine, the adapter is handed over
    trlpatch   FastLanguageModel; engine and trainer share the base weights where they can, the JSON's `status` says it

Data, initial adapter and all settings are the same. What differs besides the way are the random numbers that sampling
draws, as anywhere two engines differ. `--seed` is of everything; the documented runs have the default, 0.

Accuracy is that of greedy answers to held-out problems, computed by the trainer's own model every `--every` steps and
not by the engine. A step's seconds go from the end of the one before to its own end, without what accuracy took.
On CPU all ways run with weights that vLLM leaves unpacked: TRL's push finds nothing to load packed ones into.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arithmetic import SHAPES, Problems
from benchmarks.bench_step import command_line
from benchmarks.child import run_child
from benchmarks.launch import end_all_when_terminated
from benchmarks.result_ways import LOGGED
from benchmarks.step_timers import Lines

WAYS = ("stock", "drop-in", "trlpatch")
SUPERVISED_SECONDS = 60.0
WARMUP = 3
"""Steps that are left out of the median of seconds."""


@dataclass(frozen=True)
class Order:
    """What all ways have in common.

    Attributes:
        model: directory of the checkpoint that supervised training left.
        every: steps between two measurements of accuracy.
        ends: time.time() at which training stops, whatever `steps` says.
    """

    model: str
    digits: int
    held_out: int
    seed: int
    steps: int
    every: int
    prompts: int
    generations: int
    rank: int
    learning_rate: float
    utilization: float
    cuda: bool
    ends: float

    @property
    def problems(self) -> Problems:
        """What is added."""
        return Problems(self.digits, self.held_out, self.seed)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return 2 * self.digits + 2 + self.problems.answer_tokens


def main() -> int:
    """Do what the command line says; 1 when a way failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--ways", default="stock,trlpatch", help=f"of {', '.join(WAYS)}; default %(default)s")
    running.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    running.add_argument("--shape", choices=SHAPES, help="tiny on a CPU, else small")
    running.add_argument("--digits", type=int, default=2, help="of both numbers")
    running.add_argument("--until", type=float, default=0.3, help="accuracy at which supervised training ends")
    running.add_argument("--steps", type=int, default=150)
    running.add_argument("--every", type=int, default=10)
    running.add_argument("--held-out", type=int, default=500)
    running.add_argument("--prompts", type=int, default=64, help="a step")
    running.add_argument("--generations", type=int, default=8, help="completions of one prompt")
    running.add_argument("--rank", type=int, default=16)
    running.add_argument("--learning-rate", type=float, default=5e-4)
    running.add_argument("--utilization", type=float, default=0.15, help="the engine's share of the device")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--seconds", type=int, default=240, help="stop training in time to end within so many")
    running.add_argument("--model", type=Path, help="keep the supervised model there, and take it if it is there")
    running.add_argument("--logs", type=Path, help="a directory for what each way printed")
    running.add_argument("--out", type=Path, required=True, help="JSON")
    plotting = commands.add_parser("plot")
    plotting.add_argument("document", type=Path)
    plotting.add_argument("picture", type=Path, help="SVG or PNG")
    given = parser.parse_args()
    end_all_when_terminated()
    if given.command == "plot":
        document = json.loads(given.document.read_text(encoding="utf-8"))
        plot(document, given.picture)
        print(table(document))
        return 0
    ways = given.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))}: expected of {', '.join(WAYS)}")
    document = run(given, ways)
    print(table(document), flush=True)
    return int(any("error" in result for result in document["results"]))


def run(given: argparse.Namespace, ways: Sequence[str]) -> dict[str, Any]:
    """Train the model, then each way from it; the document is written after each."""
    started, cuda = time.time(), given.device == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        model = (given.model or Path(scratch) / "model").resolve()
        child = partial(run_child, Path(__file__), folder=Path(scratch), cuda=cuda, logs=given.logs)
        order = Order(
            model=str(model), digits=given.digits, held_out=given.held_out, seed=given.seed, steps=given.steps,
            every=given.every, prompts=given.prompts, generations=given.generations, rank=given.rank,
            learning_rate=given.learning_rate, utilization=given.utilization, cuda=cuda, ends=0.0,
        )  # fmt: skip
        document: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": command_line(sys.argv[1:], script="result_arithmetic.py"),
            "settings": {
                **asdict(order),
                "model": given.shape or ("small" if cuda else "tiny"),
                "ends": given.seconds,
            },
            "results": [],
        }
        if not (model / "supervised.json").exists():
            limit = min(SUPERVISED_SECONDS if cuda else 3600.0, given.seconds)
            words = [document["settings"]["model"], str(given.until), str(limit)]
            _, error = child(["supervised", as_json(order), *words], timeout=given.seconds)
            if error:
                raise SystemExit(f"supervised training: {error}")
        document["supervised"] = json.loads((model / "supervised.json").read_text(encoding="utf-8"))
        for place, way in enumerate(ways):
            left = max(30.0, (started + given.seconds - time.time()) / (len(ways) - place))
            limited = Order(**{**asdict(order), "ends": time.time() + 0.9 * left})
            began = time.time()
            events, error = child([way, as_json(limited)], timeout=left)
            result = summary(way, events, began)
            if error:
                result["error"] = error
            document["results"].append(result)
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    document["total_seconds"] = time.time() - started
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def as_json(order: Order) -> str:
    """For another process."""
    return json.dumps(asdict(order))


def summary(way: str, events: Sequence[Mapping[str, Any]], began: float) -> dict[str, Any]:
    """Gather what a way reported, also one that failed on its way."""
    steps = {event["number"]: {"number": event["number"], "seconds": event["seconds"]} for event in events
             if event["event"] == "step"}  # fmt: skip
    for event in events:
        if event["event"] == "log" and event["number"] in steps:
            steps[event["number"]] |= {name: event[name] for name in LOGGED.values() if name in event}
    found: dict[str, Any] = {
        "way": way,
        "steps": list(steps.values()),
        "accuracy": [[event["number"], event["share"]] for event in events if event["event"] == "accuracy"],
    }
    for event in events:
        if event["event"] == "loaded":
            found |= {"load_s": event["time"] - began, **{key: event[key] for key in ("versions", "device", "status")}}
    if timed := [step["seconds"] for step in found["steps"][WARMUP:]]:
        found["step_s"] = median(timed)
    return found


def table(document: dict[str, Any]) -> str:
    """Write what was found as Markdown."""
    supervised, settings = document["supervised"], document["settings"]
    begun, ended = (supervised["curve"][at] if supervised["curve"] else (0, 0.0) for at in (0, -1))
    about = (
        f"{settings['digits']}-digit additions, {supervised['parameters'] / 1e6:.1f} M parameters; supervised: "
        f"{ended[0]} steps, {supervised['seconds']:.0f} s, accuracy {begun[1]:.3f} to {ended[1]:.3f} on "
        f"{settings['held_out']} held-out problems; GRPO: {settings['prompts']} x {settings['generations']} "
        f"completions, r={settings['rank']}, learning rate {settings['learning_rate']:g}, seed {settings['seed']}"
    )
    names = (
        "way", "device", "accuracy before", "after", "steps", "reward, first 5", "last 5", "seconds a step", "load s",
        "logp difference", "ratio, mean", "ratio, least",
    )  # fmt: skip
    lines = [about, "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for result in document["results"]:
        steps, shares = result["steps"], [share for _, share in result["accuracy"]] or [None]
        cells = [
            result["way"], result.get("device", ""), _written(shares[0], ".3f"), _written(shares[-1], ".3f"),
            str(len(steps)), _mean(steps[:5], "reward", ".3f"),
            _mean(steps[-5:], "reward", ".3f"), _written(result.get("step_s"), ".3f"),
            _written(result.get("load_s"), ".0f"), _mean(steps, "logp_difference", ".2e"),
            _mean(steps, "ratio", ".4f"),
            _written(min((step["ratio_min"] for step in steps if "ratio_min" in step), default=None), ".3f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {one['way']} FAILED: {one['error']}" for one in document["results"] if "error" in one)]
    if "total_seconds" in document:
        lines.append(f"- {document['total_seconds']:.0f} s in all")
    return "\n".join(lines)


def _mean(steps: Sequence[Mapping[str, float]], name: str, form: str) -> str:
    values = [step[name] for step in steps if name in step]
    return _written(sum(values) / len(values) if values else None, form)


def _written(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw accuracy, reward and seconds a step of all ways, in the same bytes every time for SVG."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    matplotlib.rcParams.update({"svg.hashsalt": "trlpatch", "svg.fonttype": "none", "font.size": 9})
    figure, (share, reward, clock) = pyplot.subplots(1, 3, figsize=(11, 3.2))
    for result in document["results"]:
        steps, way = result["steps"], result["way"]
        share.plot(*zip(*result["accuracy"], strict=True), marker="o", markersize=3, label=way)
        for axes, name in ((reward, "reward"), (clock, "seconds")):
            points = [(step["number"], step[name]) for step in steps if name in step]
            axes.plot(*zip(*points, strict=True), linewidth=0.9, label=way)
    for axes, title in ((share, "greedy accuracy, held out"), (reward, "reward of a step"), (clock, "seconds a step")):
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("GRPO steps")
    for axes in (share, reward):
        axes.set_ylim(0, 1.02)
    # The first steps compile and capture; they are in the JSON.
    usual = [step["seconds"] for result in document["results"] for step in result["steps"][WARMUP:]]
    clock.set_ylim(0, 1.5 * max(usual) if usual else None)
    share.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from benchmarks.result_ways import supervised, train

        asked = Order(**json.loads(sys.argv[4]))
        if sys.argv[3] == "supervised":
            supervised(asked, sys.argv[5], float(sys.argv[6]), float(sys.argv[7]))
        else:
            train(sys.argv[3], asked, Lines(Path(sys.argv[2])))
    else:
        sys.exit(main())
