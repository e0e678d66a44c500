"""docs/matrix.md from the runs of docs/matrix.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.matrix.reasons import reason_of
from tests.matrix.runs import DEVICES, PLATFORM, UNPINNED, Run, merge
from trlpatch.compatibility.known_bad import RULES
from trlpatch.source.releases import parse_release

TRAINERS = {
    "grpo": "GRPO",
    "rloo": "RLOO",
    "online_dpo": "OnlineDPO",
    "gold": "GOLD",
    "distillation": "Distillation",
    "sdpo": "SDPO",
    "sdft": "SDFT",
    "ssd": "SSD",
    "iw_opd": "IW-OPD",
    "gfpo": "GFPO",
    "dppo": "DPPO",
}
KINDS = {
    "lora": "LoRA on an attached engine",
    "own": "LoRA on the engine that TRL builds",
    "full": "all weights",
    "liger": "LoRA, Liger's loss",
    "ddp2": "LoRA, two ranks",
}

HEAD = """\
# What ran on what

Written by `python -m tests.matrix render` from [matrix.json](matrix.json); edit neither by hand.

Each cell is one training run of one TRL release, in a process of its own, with a real vLLM engine. The figure is the
largest mean difference of a rollout, in nats, between the log-probability that the engine reports for a sampled token
and the one that the training model gives it at that moment: the level of rounding when the policy rolls out (float32
on a CPU, bfloat16 on a GPU), far above it when anything else does. *Control* is the same at the end of a run that
leaves the adapter out of every request. Stock TRL cannot be given an engine and builds its own.

| cell | |
|---|---|
| **0.0066** | it ran, and every rollout came from the policy |
| wrong 0.73 (A) | stock TRL ran, but rolled out with something else than the policy |
| fails (B) | it did not run, or trlpatch broke its promise |
| · | not run |

Letters are the [reasons](#reasons). *Sleep* is what the engine did while the optimizer worked: level 1 or 2, or the KV
cache alone.
"""


@dataclass(frozen=True, order=True)
class Column:
    """One stack: what a release ran on."""

    rank: tuple[int, tuple[int, ...], tuple[int, ...]]
    device: str
    vllm: str
    transformers: str

    @classmethod
    def of(cls, run: Run) -> Column:
        vllm, transformers = run.versions["vllm"], run.versions["transformers"]
        rank = (DEVICES.index(run.device), parse_release(vllm), parse_release(transformers))
        return cls(rank, run.device, vllm, transformers)

    @property
    def title(self) -> str:
        return f"{self.device.upper()}, vLLM {self.vllm}, transformers {self.transformers}"


class Footnotes:
    """Letters for reasons, in the order in which they are met."""

    def __init__(self) -> None:
        self._letters: dict[tuple[str, str], str] = {}
        self._releases: dict[str, list[str]] = {}

    def letter(self, run: Run) -> str:
        reason = reason_of(run)
        key = (reason.text, reason.link) if reason else (f"Not explained yet: `{run.error or run.note}`", "")
        letter = self._letters.setdefault(key, _letter(len(self._letters)))
        releases = self._releases.setdefault(letter, [])
        if run.trl not in releases:
            releases.append(run.trl)
        return letter

    def lines(self) -> list[str]:
        lines = []
        for (text, link), letter in self._letters.items():
            releases = sorted(self._releases[letter], key=parse_release)
            source = f" {_linked(link)}" if link else ""
            lines.append(f"- **{letter}** ({', '.join(releases)}): {text}{source}")
        return lines


def render(runs: Iterable[Run]) -> str:
    """Return the document."""
    everything = merge(runs)
    runs = [run for run in everything if run.stack not in UNPINNED]
    others = [run for run in everything if run.stack in UNPINNED]
    notes = Footnotes()
    cases = sorted({run.case for run in runs}, key=_place)
    sections = [_section(case, [run for run in runs if run.case == case], notes) for case in cases]
    parts = [HEAD, "## In numbers\n\n" + "\n".join(_numbers(runs, cases)), *sections]
    if others:
        parts.append("## Other versions\n\n" + "\n".join(_others(others, notes)))
    if lines := notes.lines():
        parts.append("## Reasons\n\n" + "\n".join(lines))
    parts.append("## Known not to work\n\n" + "\n".join(_rules()))
    parts.append("## Versions and commands\n\n" + "\n".join(_origins(everything)))
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _others(runs: Sequence[Run], notes: Footnotes) -> list[str]:
    """Return a table of runs with versions that nothing pins, one run a row."""
    lines = ["Releases of vLLM and transformers between, below and above those of the stacks, one run each.", ""]
    lines += ["| | TRL | case | |", "|---|---|---|---|"]
    for run in runs:
        who = "stock TRL: " if run.stock else ""
        lines.append(f"| {Column.of(run).title} | {run.trl} | {who}{_title(run.case)} | {_cell(run, notes)} |")
    return lines


def _rules() -> list[str]:
    lines = ["Whatever trlpatch does. `trlpatch check` knows these and names what to install instead.", ""]
    lines += ["| versions | why | |", "|---|---|---|"]
    for rule in RULES:
        versions = " with ".join(f"{name} {ranges}" for name, ranges in rule.versions.items())
        lines.append(f"| {versions} | {rule.reason} | {_linked(rule.source)} |")
    return lines


def counted(runs: Sequence[Run]) -> str:
    """Return `stock runs 3 of 29, right 1; trlpatch runs 29 of 29` for the runs of one case on one stack."""
    stock = [run for run in runs if run.stock]
    patched = [run for run in runs if not run.stock]
    parts = []
    if stock:
        ran = [run for run in stock if run.verdict != "error"]
        right = sum(run.verdict == "pass" for run in ran)
        parts.append(f"stock runs {len(ran)} of {len(stock)}, right {right}")
    if patched:
        parts.append(f"trlpatch runs {sum(run.verdict == 'pass' for run in patched)} of {len(patched)}")
    return "; ".join(parts)


def _numbers(runs: list[Run], cases: list[str]) -> list[str]:
    lines = ["| | " + " | ".join(column.title for column in _columns(runs)) + " |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for case in cases:
        cells = [
            counted([run for run in runs if run.case == case and Column.of(run) == column]) or "·"
            for column in _columns(runs)
        ]
        lines.append(f"| {_title(case)} | {' | '.join(cells)} |")
    return lines if cases else ["Nothing has been run yet."]


def _section(case: str, runs: list[Run], notes: Footnotes) -> str:
    shown: list[tuple[Column, bool]] = []
    for column in _columns(runs):
        here = [run for run in runs if Column.of(run) == column]
        shown += [(column, stock) for stock in (True, False) if any(run.stock == stock for run in here)]
    head = [f"{column.title}: {'stock' if stock else 'trlpatch'}" for column, stock in shown]
    lines = [f"## {_title(case)}", "", f"| TRL | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for release in sorted({run.trl for run in runs}, key=parse_release):
        cells = []
        for column, stock in shown:
            here = [run for run in runs if (run.trl, run.stock, Column.of(run)) == (release, stock, column)]
            cells.append(_cell(here[0], notes) if here else "·")
        lines.append(f"| {release} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(run: Run, notes: Footnotes) -> str:
    gap = "" if run.gap_max is None else _figure(run.gap_max)
    extras = [] if run.control is None else [f"control {_figure(run.control)}"]
    if run.sleep:
        extras.append(f"sleep {run.sleep}")
    tail = f", {', '.join(extras)}" if extras else ""
    if run.verdict == "pass":
        return f"**{gap}**{tail}"
    if run.verdict == "wrong":
        return f"wrong {gap}{tail} ({notes.letter(run)})"
    return f"fails{f' {gap}' if gap else ''} ({notes.letter(run)})"


def _figure(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _origins(runs: list[Run]) -> list[str]:
    lines = []
    for column in _columns(runs):
        here = [run for run in runs if Column.of(run) == column]
        lines += [f"### {column.title}", ""]
        beside = dict.fromkeys(name for run in here for name in run.versions if name not in (*PLATFORM, "trl"))
        found = [f"{name} {', '.join(sorted({run.versions.get(name, '-') for run in here}))}" for name in beside]
        dates = sorted({run.date for run in here})
        lines += ["; ".join([*found, " to ".join(dict.fromkeys((dates[0], dates[-1])))]) + ".", "", "```"]
        lines += [*dict.fromkeys(run.command.replace(run.trl, "RELEASE") for run in here), "```", ""]
    return lines


def _columns(runs: Iterable[Run]) -> list[Column]:
    return sorted({Column.of(run) for run in runs})


def _title(case: str) -> str:
    """`GRPO, all weights` for `grpo-full`."""
    trainer, _, kind = case.rpartition("-")
    return f"{TRAINERS.get(trainer, trainer)}, {KINDS.get(kind, kind)}"


def _place(case: str) -> tuple[int, int, str]:
    trainer, _, kind = case.rpartition("-")
    first, second = list(TRAINERS), list(KINDS)
    return (
        first.index(trainer) if trainer in first else len(first),
        second.index(kind) if kind in second else len(second),
        case,
    )


def _linked(link: str) -> str:
    return f"[{link.removeprefix('https://').removeprefix('github.com/')}]({link})"


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else _letter(index // 26 - 1) + _letter(index % 26)
