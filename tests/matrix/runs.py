"""Runs of docs/matrix.json: one training run of one TRL release on one stack, and how the list is kept.

The file is a list of objects with the fields of `Run`, one object a line, sorted by device, vLLM, case and release.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from tests.golden.sources import ROOT
from trlpatch.errors import UnparsableVersion
from trlpatch.source.releases import parse_release

MATRIX = ROOT / "docs" / "matrix.json"
SUMMARY = ROOT / "trlpatch" / "compatibility" / "tested.json"
DEVICES = ("gpu", "cpu")
NEWEST, OTHER = "newest", "other"
UNPINNED = (NEWEST, OTHER)
"""Stacks of runs with versions that nothing pins; the document has them in a table of their own."""
STACKS = ("tf4", "tf5", "cpu4", "cpu5", *UNPINNED)
SLEEPS = ("", "1", "2", "kv")
VERDICTS = ("pass", "fail", "wrong", "error")
PLATFORM = ("vllm", "transformers")


class BadRun(ValueError):
    """A run that does not have the format; says which file, which run, which field."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        case: trainer and adapter, such as `grpo-lora` or `online_dpo-lora`.
        versions: of what took part, by distribution, without local parts; `PLATFORM` always.
        date: ISO day of the run.
        stock: whether TRL ran without trlpatch.
        verdict: "pass": every rollout came from the policy. "wrong": it ran, but rollouts did not (stock). "fail": the
            same or any other broken promise of a patched run. "error": it did not run.
        gap_max: largest mean difference of a rollout, in nats, between the engine's log-probabilities of sampled
            tokens and the training model's; None where none was measured.
        control: the same at the end of a run that leaves the adapter out of every request; None without a control.
        rewards: means of the first and the last five steps.
        sleep: how the engine slept: level "1" or "2", "kv" for the KV cache alone, "" for not at all.
        seconds: wall time of the run's process.
        error: last line of what was raised, for "error".
    """

    trl: str
    case: str
    device: str
    stack: str
    versions: dict[str, str]
    date: str
    command: str
    stock: bool
    verdict: str
    steps: int
    gap_max: float | None
    control: float | None
    rewards: tuple[float, float] | None
    sleep: str
    seconds: float
    note: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        parse_release(self.trl)
        date.fromisoformat(self.date)
        for field, known in (("device", DEVICES), ("stack", STACKS), ("sleep", SLEEPS), ("verdict", VERDICTS)):
            value = getattr(self, field)
            if value not in known:
                raise BadRun(f"{field} is {value!r}; expected one of {', '.join(map(repr, known))}")
        if not set(PLATFORM) <= self.versions.keys():
            raise BadRun(f"versions has {', '.join(self.versions)}; expected at least {', '.join(PLATFORM)}")
        if self.verdict == "wrong" and not self.stock:
            raise BadRun("'wrong' is for stock runs; a patched run whose rollouts are not the policy's is 'fail'")
        if self.verdict == "error" and not self.error:
            raise BadRun("verdict 'error' without the error's last line")
        if self.verdict in ("pass", "wrong") and self.gap_max is None:
            raise BadRun(f"verdict {self.verdict!r} without gap_max: nothing was measured")

    @property
    def key(self) -> tuple[Any, ...]:
        """What a newer run replaces; also the order of the file."""
        versions = self.versions
        return (
            DEVICES.index(self.device),
            parse_release(versions["vllm"]),
            parse_release(versions["transformers"]),
            self.case,
            parse_release(self.trl),
            not self.stock,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the run as the file holds it."""
        return asdict(self)


def run_of(entry: dict[str, Any]) -> Run:
    """Return the run that `entry` describes.

    Raises:
        BadRun: a field is missing, unknown or out of its range.
    """
    names = {field.name for field in fields(Run)}
    if unknown := entry.keys() - names:
        raise BadRun(f"unknown fields: {', '.join(sorted(unknown))}; known are {', '.join(sorted(names))}")
    if absent := names - entry.keys() - {"note", "error"}:
        raise BadRun(f"without {', '.join(sorted(absent))}")
    rewards = entry["rewards"]
    return Run(**{**entry, "rewards": tuple(rewards) if rewards else None})


def load(path: Path) -> list[Run]:
    """Read a file of runs; a file that does not exist holds none.

    Raises:
        BadRun: the file or one of its runs does not have the format.
    """
    if not path.exists():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list):
        raise BadRun(f"{path}: expected a list of runs, found {type(entries).__name__}")
    runs = []
    for index, entry in enumerate(entries):
        try:
            runs.append(run_of(entry))
        except (ValueError, TypeError, UnparsableVersion) as error:
            name = f"{entry.get('case')} on {entry.get('trl')}" if isinstance(entry, dict) else repr(entry)
            raise BadRun(f"{path}: run {index} ({name}): {error}") from error
    return runs


def merge(*lists: Iterable[Run]) -> list[Run]:
    """Return all runs sorted; of those with one key the newest, and of those of one day the one that comes last."""
    newest: dict[tuple[Any, ...], Run] = {}
    for run in (run for runs in lists for run in runs):
        if run.key not in newest or run.date >= newest[run.key].date:
            newest[run.key] = run
    return [newest[key] for key in sorted(newest)]


def write(path: Path, runs: Iterable[Run]) -> None:
    """Write runs, one a line, so that a diff shows which changed."""
    _write_lines(path, [run.to_dict() for run in merge(runs)])


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n", encoding="utf-8")


def summary(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return what `trlpatch.compatibility` knows of the runs with trlpatch: one entry per TRL release and stack."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in merge(runs):
        if run.stock:
            continue
        platform = {name: run.versions[name] for name in PLATFORM}
        empty = {"trl": run.trl, **platform, "device": run.device, "passed": [], "failed": [], "date": run.date}
        entry = entries.setdefault((run.device, *platform.values(), run.trl), empty)
        entry["passed" if run.verdict == "pass" else "failed"].append(run.case)
        entry["date"] = max(entry["date"], run.date)
    return [entries[key] for key in sorted(entries, key=lambda key: (key[0], *map(parse_release, key[1:])))]


def write_summary(path: Path, runs: Iterable[Run]) -> None:
    """Write the summary, one entry a line."""
    _write_lines(path, summary(runs))
