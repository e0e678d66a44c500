"""How much of a small update reaches the engine: the change of log-probabilities by an adapter, against float32.

    PYTHONPATH=DIR/1.16.0 python benchmarks/faithfulness.py run --out faithful.json        # CUDA, some 3 minutes
    python benchmarks/faithfulness.py run --device cpu --out faithful.json                 # a tiny model, bfloat16
    python benchmarks/faithfulness.py plot faithful.json faithful.svg     # needs matplotlib; prints the table again

For each learning rate an adapter is trained as RL moves one: AdamW, clipped gradients, policy-gradient losses with
advantages of 1 and -1 on fixed sequences. Then the log-probability of every token of these sequences is computed with
the adapter and without it. The *change* is the difference, and the reference's is that of a float32 model (bfloat16
weights are exact in float32) with the adapter in float32. Ways:

    trainer    transformers and PEFT in bfloat16 under autocast, the adapter in float32, as TRL trains
    trlpatch   an engine with trlpatch's LoRA layers, the adapter handed over in memory
    vllm       the same with vLLM's own LoRA layers
    merge      an engine without LoRA, weights merged by PEFT in bfloat16 and pushed, as stock TRL does at every step

All of a way's changes are fitted by a line over the reference's. The slope is the share of the update that arrives on
average; R2 is how much of the change's variance is the update and not rounding, of the base model's forward passes as
well; `missed` is the root mean square of what differs, over that of the reference's change.
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
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import SHAPES, command_line, random_model
from benchmarks.child import run_child
from benchmarks.launch import end_all_when_terminated
from benchmarks.step_timers import Lines

ENGINES = ("trlpatch", "vllm", "merge")
SHOWN = 200
"""Tokens of a panel of the picture, which the JSON keeps."""


@dataclass(frozen=True)
class Order:
    """What all processes are told.

    Attributes:
        model: directory of a checkpoint, on CUDA in bfloat16.
        folder: where adapters, merged checkpoints and the changes go.
    """

    model: str
    folder: str
    learning_rates: list[float]
    steps: int
    rank: int
    sequences: int
    tokens: int
    seed: int
    cuda: bool

    @property
    def device(self) -> str:
        """Torch's name of it."""
        return "cuda" if self.cuda else "cpu"

    @property
    def base(self) -> str:
        """The checkpoint in bfloat16 that all ways start from; on a CPU the first process makes it."""
        return self.model if self.cuda else str(Path(self.folder) / "base")

    def adapter(self, place: int) -> Path:
        """Where PEFT saved the adapter of the learning rate at `place`."""
        return Path(self.folder) / f"adapter-{place}"

    def merged(self, place: int) -> Path:
        """Where the checkpoint is that has it merged."""
        return Path(self.folder) / f"merged-{place}"

    def ids(self) -> Any:
        """Return the sequences, (sequences, tokens), int64, on the CPU."""
        import torch

        vocabulary = json.loads((Path(self.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        return torch.randint(0, vocabulary, (self.sequences, self.tokens), generator=torch.Generator().manual_seed(1))


def main() -> int:
    """Do what the command line says; 1 when a process failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    running.add_argument("--shape", choices=SHAPES, help="tiny on a CPU, else 0.5b")
    running.add_argument("--ways", default=",".join(ENGINES), help="engines, comma-separated")
    running.add_argument("--learning-rates", default="1e-6,1e-5")
    running.add_argument("--steps", type=int, default=60)
    running.add_argument("--rank", type=int, default=16)
    running.add_argument("--sequences", type=int, default=32)
    running.add_argument("--tokens", type=int, default=128, help="of a sequence")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--seconds", type=int, default=200, help="for everything")
    running.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "trlpatch-bench-models")
    running.add_argument("--logs", type=Path, help="a directory for what each process printed")
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
    if unknown := set(given.ways.split(",")) - set(ENGINES):
        parser.error(f"--ways: {', '.join(sorted(unknown))}: expected of {', '.join(ENGINES)}")
    document = run(given)
    print(table(document), flush=True)
    return int(bool(document["errors"]))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train the adapters, compute every way's changes, and fit them; the document is written after each process."""
    started, cuda = time.perf_counter(), given.device == "cuda"
    shape = given.shape or ("0.5b" if cuda else "tiny")
    model = random_model(shape, given.models.resolve(), cuda=cuda)
    with tempfile.TemporaryDirectory() as scratch:
        order = Order(
            model=str(model), folder=str(Path(scratch).resolve()), steps=given.steps, rank=given.rank,
            learning_rates=[float(text) for text in given.learning_rates.split(",")], sequences=given.sequences,
            tokens=given.tokens, seed=given.seed, cuda=cuda,
        )  # fmt: skip
        document: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": command_line(sys.argv[1:], script="faithfulness.py"),
            "settings": {**asdict(order), "model": shape, "folder": ""},
            "ways": {},
            "errors": {},
            "seconds": {},
        }
        changes: dict[str, list[list[float]]] = {}
        for way in ("trainer", *given.ways.split(",")):
            began = time.perf_counter()
            events, error = run_child(
                Path(__file__), [way, json.dumps(asdict(order))], Path(order.folder),
                max(given.seconds - (began - started), 10.0), cuda=order.cuda, logs=given.logs,
            )  # fmt: skip
            document["seconds"][way] = time.perf_counter() - began
            if error:
                document["errors"][way] = error
            for event in events:
                document |= {key: event[key] for key in ("versions", "device", "updates") if key in event}
                changes |= event.get("changes", {})
            if "reference" not in changes:
                break
            document["ways"] = {
                name: [fit(*pair) for pair in zip(changes["reference"], found, strict=True)]
                for name, found in changes.items()
                if name != "reference"
            }
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    document["total_seconds"] = time.perf_counter() - started
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def fit(reference: Sequence[float], change: Sequence[float]) -> dict[str, Any]:
    """Fit the line of `change` over `reference`, tokens of all sequences.

    Returns slope, its standard error, R2 and `missed`; all 0 but `missed` for a change that is 0 everywhere.
    """
    count, mean_x, mean_y = len(reference), fmean(reference), fmean(change)
    xx = sum((x - mean_x) ** 2 for x in reference)
    yy = sum((y - mean_y) ** 2 for y in change)
    xy = sum((x - mean_x) * (y - mean_y) for x, y in zip(reference, change, strict=True))
    slope = xy / xx
    differ = sum((y - x) ** 2 for x, y in zip(reference, change, strict=True))
    return {
        "slope": slope,
        "slope_error": sqrt(max(0.0, yy - slope * xy) / (count - 2) / xx),
        "r2": xy * xy / (xx * yy) if yy else 0.0,
        "missed": sqrt(differ / sum(x * x for x in reference)),
        "change": sqrt(sum(y * y for y in change) / count),
        "points": [[x, y] for x, y in zip(reference[:SHOWN], change[:SHOWN], strict=True)],
    }


def table(document: Mapping[str, Any]) -> str:
    """Write what was found as Markdown."""
    settings = document["settings"]
    lines = [
        f"{settings['model']}, {document.get('device', 'no device')}, r={settings['rank']}, "
        f"{settings['steps']} steps, {settings['sequences']} x {settings['tokens']} tokens; "
        + ", ".join(f"{name} {version}" for name, version in document.get("versions", {}).items()),
        "",
        "| learning rate | way | slope | R2 | missed | change, nats | |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, rate in enumerate(settings["learning_rates"]):
        for way, fits in document["ways"].items():
            one = fits[place]
            told = document["updates"][place]
            note = f"{told['unmoved']:.1%} of the adapted weights do not move" if way == "merge" else ""
            written = f"{one['slope']:.3f} ± {one['slope_error']:.3f} | {one['r2']:.3f} | {one['missed']:.1%}"
            lines.append(f"| {rate:g} | {way} | {written} | {one['change']:.2e} | {note} |")
    lines += ["", *(f"- {way} FAILED: {error}" for way, error in document["errors"].items())]
    spent = ", ".join(f"{way} {seconds:.0f}" for way, seconds in document["seconds"].items())
    return "\n".join([*lines, f"- {document.get('total_seconds', 0.0):.0f} s in all: {spent}"])


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw each way's changes over the reference's, in the same bytes every time for SVG."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    matplotlib.rcParams.update({"svg.hashsalt": "trlpatch", "svg.fonttype": "none", "font.size": 8})
    rates = document["settings"]["learning_rates"]
    ways = list(document["ways"])
    figure, grid = pyplot.subplots(
        len(rates), len(ways), figsize=(2.6 * len(ways), 2.5 * len(rates)), squeeze=False, sharex="row", sharey="row"
    )
    for row, rate in zip(range(len(rates)), rates, strict=True):
        for axes, way in zip(grid[row], ways, strict=True):
            one = document["ways"][way][row]
            xs, ys = zip(*one["points"], strict=True)
            ends = [min(xs), max(xs)]
            axes.scatter(xs, ys, s=3, linewidths=0, alpha=0.5)
            axes.plot(ends, ends, color="0.4", linewidth=0.8, linestyle=":")
            axes.plot(ends, [one["slope"] * x for x in ends], color="tab:red", linewidth=1)
            axes.set_title(f"{way}, {rate:g}: slope {one['slope']:.2f}, R2 {one['r2']:.2f}", fontsize=7.5, loc="left")
    figure.supxlabel("change of a token's log-probability by the adapter: float32 reference, nats", fontsize=8)
    figure.supylabel("the way's", fontsize=8)
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from benchmarks.faithful_ways import run_way

        run_way(sys.argv[3], Order(**json.loads(sys.argv[4])), Lines(Path(sys.argv[2])))
    else:
        sys.exit(main())
