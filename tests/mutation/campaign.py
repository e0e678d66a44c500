"""The campaign: mutants judged in processes, counted by category, and printed as a table."""

from __future__ import annotations

import difflib
import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from tests.mutation import hosts
from tests.mutation.mutants import CATEGORIES, Mutant
from tests.mutation.verdicts import VERDICTS, Judged, judge

FAULTS = ("silent", "false alarm")


def run(mutants: Iterable[Mutant], processes: int = 1) -> Iterator[Judged]:
    """Judge all mutants, in their order."""
    if processes == 1:
        yield from map(safely, mutants)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        remaining = iter(mutants)
        while batch := list(itertools.islice(remaining, 64 * processes)):
            yield from pool.imap(safely, batch, chunksize=4)


def safely(mutant: Mutant) -> Judged:
    """Judge a mutant; an exception of trlpatch's own is no refusal, and no verdict."""
    try:
        return judge(mutant)
    except Exception as error:
        error.add_note(f"mutant {mutant.name}")
        raise


def table(judged: Iterable[Judged]) -> str:
    """Return the counts by category, for people."""
    counts: Counter[tuple[str, str]] = Counter((j.mutant.category, j.verdict) for j in judged)
    wide = max(len(text) for text in CATEGORIES.values()) + 2
    lines = [f"{'category':{wide + 2}}" + "".join(f"{verdict:>13}" for verdict in VERDICTS)]
    for letter, text in CATEGORIES.items():
        row = [counts[letter, verdict] for verdict in VERDICTS]
        if any(row):
            lines.append(f"{letter} {text:{wide}}" + "".join(f"{number:13}" for number in row))
    total = [sum(counts[letter, verdict] for letter in CATEGORIES) for verdict in VERDICTS]
    lines.append(f"{'all':{wide + 2}}" + "".join(f"{number:13}" for number in total))
    return "\n".join(lines)


def diff(mutant: Mutant, context: int = 2) -> str:
    """Return what the mutant changes in TRL."""
    parts: list[str] = []
    for path, text in mutant.files.items():
        try:
            before = hosts.read(mutant.release, path)
        except FileNotFoundError:
            before = ""
        lines = before.splitlines(keepends=True), (text or "").splitlines(keepends=True)
        if text is None or not before:
            parts.append(f"--- {path}: {'gone' if text is None else 'new, ' + str(len(lines[1])) + ' lines'}\n")
        else:
            parts += difflib.unified_diff(*lines, f"a/{path}", f"b/{path}", n=context)
    return "".join(parts)


def explained(judged: Judged) -> str:
    """Return one verdict with its reasons and its change, for people."""
    reasons = "".join(f"  {reason}\n" for reason in judged.reasons[:6])
    return f"{judged.verdict}: {judged.mutant.name}\n{reasons}{diff(judged.mutant)}"


def saved(judged: Iterable[Judged], path: Path | None) -> Iterator[Judged]:
    """Yield every verdict, and write it as a line of JSON; with its change where it is a fault or unproven."""
    with path.open("w", encoding="utf-8") if path else nullcontext() as file:
        for one in judged:
            row = {
                "mutant": one.mutant.name,
                "kind": one.mutant.kind,
                "category": one.mutant.category,
                "release": one.mutant.release,
                "verdict": one.verdict,
                "reasons": list(one.reasons),
                **({"diff": diff(one.mutant)} if one.verdict in (*FAULTS, "unproven") else {}),
            }
            if file:
                print(json.dumps(row), file=file, flush=True)
            yield one
