"""Tables and pictures of docs/scaling.md, from trlpatch/scale and its calibration.

    python benchmarks/scaling_report.py            # needs matplotlib for the pictures
    python benchmarks/scaling_report.py --without-pictures

Each table stands between two markers of its own in the page; the rest of the page is left alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trlpatch.scale import Calibration, Fixed, LogNormal, Setting, advise, predict, simulate, split
from trlpatch.scale.lengths import Lengths
from trlpatch.scale.setting import from_json

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIXED, TAIL = Fixed(1024), LogNormal(400, 1.0, 4096)
LENGTHS: dict[str, Lengths] = {"1024 each": FIXED, "long tail": TAIL}
MODES = ("colocated", "sync", "prefetch", "async")
GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
BASE = Setting(completions=1024, prompt_tokens=64)


def main() -> int:
    """Write tables, and pictures unless they are not wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--without-pictures", action="store_true")
    given = parser.parse_args()
    page = given.docs / "scaling.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    if not given.without_pictures:
        for name, draw in PICTURES.items():
            draw(given.docs / name)
    return 0


def filled(text: str) -> str:
    """Return the page with every table written anew.

    Raises:
        ValueError: the page lacks the markers of a table.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin, written by benchmarks/scaling_report.py -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"docs/scaling.md: expected one line {begin!r} and one {end!r} after it; put them back")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def inputs() -> str:
    """Say what the model computes with, and on what each number stands."""
    known = Calibration.load()
    rows = [
        (name.replace("_", " "), f"{one.value:.4g} {one.unit}".strip(), f"**{one.basis}**", one.source)
        for name, one in known.inputs.items()
    ]
    rows += [
        (
            f"generation of {point.sequences} x {point.tokens}", f"{point.seconds:.3f} s", f"**{point.basis}**",
            point.source,
        )
        for point in known.generation_points
    ]  # fmt: skip
    return _markdown(("input", "value", "stands on", "where"), rows)


def checks() -> str:
    """Put predictions beside measurements that they were not made from."""
    known = Calibration.load()
    rows = []
    for check in known.checks:
        predicted = getattr(predict(from_json(check.setting), known), check.quantity)
        measured = " to ".join(f"{value:.2f}" for value in check.measured) or "not yet"
        off = ""
        if check.measured:
            middle = sum(check.measured) / len(check.measured)
            off = f"{predicted / middle - 1:+.0%}"
        rows.append((check.name, check.quantity.removesuffix("_s"), f"{predicted:.2f} s", measured, off, check.source))
    return _markdown(("run", "of it", "predicted", "measured s", "off", "where"), rows)


def wanted() -> str:
    """Say how many rollout GPUs some settings want."""
    rows = []
    for label, lengths in LENGTHS.items():
        for trainers, completions in ((1, 64), (8, 512), (64, 4096)):
            for mode in ("sync", "prefetch", "async"):
                advice = advise(BASE.with_(mode=mode, trainer_gpus=trainers, completions=completions, lengths=lengths))
                found = dict(advice.rows)
                step = predict(
                    BASE.with_(
                        mode=mode, trainer_gpus=trainers, completions=completions, lengths=lengths,
                        rollout_gpus=advice.wants,
                    )
                ).step_s  # fmt: skip
                rows.append(
                    (
                        label, str(trainers), str(completions), mode, str(advice.wants), str(advice.stops),
                        f"{step:.1f} s", f"{found[512].step_s:.1f} s", advice.bound,
                    )
                )  # fmt: skip
    head = (
        "completions", "trainer GPUs", "of a step", "mode", "wants", "stops at", "step with these", "step with 512",
        "waits for",
    )  # fmt: skip
    return _markdown(head, rows)


def divided() -> str:
    """Divide a number of GPUs between trainer and engines, in each mode."""
    rows = []
    for gpus in (2, 8, 32, 128, 512):
        for mode in MODES:
            cells = [str(gpus), mode]
            for lengths in LENGTHS.values():
                best = split(BASE.with_(mode=mode, lengths=lengths), gpus)
                found = simulate(best, steps=10, seed=0)
                shares = f"{best.trainer_gpus} + {best.rollout_gpus}" if mode != "colocated" else str(gpus)
                cells += [shares, f"{predict(best).step_s:.1f} s", f"{found.step_s:.1f} s", f"{found.dropped:.0%}"]
            rows.append(cells)
    head = ("GPUs", "mode", *("trainer + rollout", "closed form", "simulated", "dropped") * 2)
    return _markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {"inputs": inputs, "checks": checks, "wanted": wanted, "divided": divided}


def _pyplot() -> Any:
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("svg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    matplotlib.rcParams.update({"svg.hashsalt": "trlpatch", "svg.fonttype": "none", "font.size": 9})
    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def draw_gpus(path: Path) -> None:
    """Steps an hour by the number of all GPUs, divided as is best; lines are closed forms, dots are simulated."""
    _draw_by_mode(
        path, GPUS, MODES, lambda mode, lengths, gpus: split(BASE.with_(mode=mode, lengths=lengths), gpus),
        lambda seconds: 3600 / seconds, "steps an hour", "GPUs, trainer's and engines'", "1024 completions",
    )  # fmt: skip


def draw_rollouts(path: Path) -> None:
    """Seconds of a step by the number of rollout GPUs, for eight trainer GPUs and 512 completions."""
    base = BASE.with_(trainer_gpus=8, completions=512)
    _draw_by_mode(
        path, [2**power for power in range(10)], MODES[1:],
        lambda mode, lengths, count: base.with_(mode=mode, lengths=lengths, rollout_gpus=count),
        lambda seconds: seconds, "seconds a step", "rollout GPUs", "8 trainer GPUs, 512 completions",
    )  # fmt: skip


def _draw_by_mode(
    path: Path,
    counts: Sequence[int],
    modes: Sequence[str],
    setting: Callable[[Any, Lengths, int], Setting],
    shown: Callable[[float], float],
    ylabel: str,
    xlabel: str,
    title: str,
) -> None:
    """Draw what seconds of a step are `shown` as by a count, a picture for each distribution of lengths."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, (label, lengths) in zip(axes, LENGTHS.items(), strict=True):
        for mode in modes:
            settings = [setting(mode, lengths, count) for count in counts]
            (line,) = axis.plot(counts, [shown(predict(one).step_s) for one in settings], label=mode)
            dots = [shown(simulate(one, steps=10, seed=0).step_s) for one in settings]
            axis.plot(counts, dots, "o", color=line.get_color(), markersize=3)
        axis.set(xscale="log", yscale="log", xlabel=xlabel, title=f"{title}, {label}")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    axes[0].legend(frameon=False)
    _save(pyplot, figure, path)


def draw_staleness(path: Path) -> None:
    """What the bound on staleness gives and drops, with a long tail."""
    pyplot = _pyplot()
    bounds = list(range(9))
    figure, (speed, dropped) = pyplot.subplots(1, 2, figsize=(10, 3.2))
    for gpus in (8, 32, 128):
        setting = split(BASE.with_(mode="async", lengths=TAIL), gpus)
        settings = [setting.with_(max_staleness=bound) for bound in bounds]
        runs = [simulate(one, steps=10, seed=0) for one in settings]
        (line,) = speed.plot(bounds, [3600 / predict(one).step_s for one in settings], label=f"{gpus} GPUs")
        speed.plot(bounds, [3600 / run.step_s for run in runs], "o", color=line.get_color(), markersize=3)
        dropped.plot(bounds, [100 * run.dropped for run in runs], "o-", color=line.get_color(), markersize=3)
    speed.set(xlabel="max_staleness", ylabel="steps an hour", yscale="log")
    dropped.set(xlabel="max_staleness", ylabel="% of groups dropped, too old")
    speed.legend(frameon=False)
    for axis in (speed, dropped):
        axis.grid(alpha=0.3)
    _save(pyplot, figure, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "scaling-gpus.svg": draw_gpus,
    "scaling-rollout-gpus.svg": draw_rollouts,
    "scaling-staleness.svg": draw_staleness,
}

if __name__ == "__main__":
    sys.exit(main())
