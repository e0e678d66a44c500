"""Keep docs/matrix.json and write what follows from it.

python -m tests.matrix add docs/matrix.json RUNS.json...   add runs; of one release, case and stack the newest stays
python -m tests.matrix render                              write docs/matrix.md and trlpatch's own summary again
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.matrix.reasons import reason_of
from tests.matrix.render import render
from tests.matrix.runs import MATRIX, SUMMARY, BadRun, Run, load, merge, write, write_summary


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="merge runs into a matrix, then render it")
    adding.add_argument("matrix", type=Path)
    adding.add_argument("runs", type=Path, nargs="+")
    rendering = commands.add_parser("render", help="write the matrix as a document")
    rendering.add_argument("matrix", type=Path, nargs="?", default=MATRIX)
    given = parser.parse_args(arguments)
    try:
        runs = load(given.matrix)
        if given.command == "add":
            runs = merge(runs, *[_existing(path) for path in given.runs])
            write(given.matrix, runs)
    except BadRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.matrix.with_suffix(".md").write_text(render(runs), encoding="utf-8")
    if given.matrix.resolve() == MATRIX.resolve():
        write_summary(SUMMARY, runs)
    _tell(runs)
    return 0


def _existing(path: Path) -> list[Run]:
    if not path.exists():
        raise BadRun(f"{path} does not exist")
    return load(path)


def _tell(runs: list[Run]) -> None:
    print(f"{len(runs)} runs")
    for run in runs:
        if run.verdict != "pass" and reason_of(run) is None:
            who = "stock" if run.stock else "trlpatch"
            print(f"no reason in tests/matrix/reasons.py: {who} {run.case} on {run.trl}: {run.error or run.note}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
