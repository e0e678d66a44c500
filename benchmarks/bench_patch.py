"""Time of `import trlpatch; trlpatch.PatchFastRL()` in fresh processes, without and with a filled cache.

    python benchmarks/bench_patch.py --repeats 9 --trl-path DIR --trl-path DIR ...
    python benchmarks/bench_patch.py --repeats 21 --after torch --after trl

DIR holds an unpacked `trl`; without any, the installed TRL is measured. Prints medians as a Markdown table. CPU is the
process's own user and system time over that statement, wall the same by the clock; starting the interpreter is not in
them, nor is importing the modules that --after names. Fails if a warm run imports libcst or misses the cache, or a
cold run hits it. The warm cache has an index: the first two runs with it are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CHILD = """
import importlib, json, sys, time
for name in sys.argv[1:]:
    importlib.import_module(name)
before = set(sys.modules)
wall, cpu = time.perf_counter(), time.process_time()
import trlpatch
report = trlpatch.PatchFastRL()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
cache = sorted(set(report.cache.values()))
imported = set(sys.modules) - before
print(json.dumps([report.trl, len(report.files), wall, cpu, cache, "libcst" in imported, "trl" in imported]))
"""


@dataclass(frozen=True)
class Sample:
    """One process: seconds by the clock and of CPU, and what it did."""

    trl: str
    targets: int
    wall: float
    cpu: float
    cache: list[str]
    imported_libcst: bool
    imported_trl: bool


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--trl-path", type=Path, action="append", default=[])
    parser.add_argument(
        "--after", action="append", default=[], metavar="MODULE", help="imported before the clock starts"
    )
    arguments = parser.parse_args()
    print("| TRL | files | cold CPU | cold wall | warm CPU | warm wall |")
    print("|---|---|---|---|---|---|")
    for path in arguments.trl_path or [None]:
        print(row(path, arguments.repeats, arguments.after), flush=True)


def row(trl: Path | None, repeats: int, after: list[str]) -> str:
    """Return the table row of one TRL."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # The first fills the bytecode cache, so that no sample compiles trlpatch or libcst, the second the index.
        for _ in range(2):
            sample(trl, folder, folder / "warm", after)
        cold = [sample(trl, folder, folder / f"cold-{number}", after) for number in range(repeats)]
        warm = [sample(trl, folder, folder / "warm", after) for _ in range(repeats)]
    for one in cold:
        expect(one.cache == ["miss"] and one.imported_libcst and not one.imported_trl, "a cold run", one)
    for one in warm:
        expect(one.cache == ["hit"] and not one.imported_libcst and not one.imported_trl, "a warm run", one)
    figures = [
        f"{median(cold, 'cpu'):.2f} s",
        f"{median(cold, 'wall'):.2f} s",
        f"{median(warm, 'cpu') * 1000:.1f} ms",
        f"{median(warm, 'wall') * 1000:.1f} ms",
    ]
    return f"| {warm[0].trl} | {warm[0].targets} | {' | '.join(figures)} |"


def sample(trl: Path | None, folder: Path, cache: Path, after: list[str]) -> Sample:
    """Run one process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in (trl, ROOT) if place is not None)
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    environment["TRLPATCH_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", CHILD, *after]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    values: list[Any] = json.loads(done.stdout)
    return Sample(*values)


def median(samples: list[Sample], figure: str) -> float:
    """Return the median of one figure."""
    return float(statistics.median(getattr(one, figure) for one in samples))


def expect(condition: bool, what: str, found: Sample) -> None:
    """Stop if a sample is not what it is called."""
    if not condition:
        sys.exit(f"{what} was none: {found}")


if __name__ == "__main__":
    main()
