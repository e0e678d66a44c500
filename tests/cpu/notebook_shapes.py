"""How far the shapes of public RL notebooks get with the import line replaced, with and without `compat`.

    python -m tests.cpu.notebook_shapes --out RUNS.json [--releases 0.22.2 1.16.0] [--modes import compat] [SHAPE ...]
    python -m tests.cpu.notebook_shapes --table BEFORE.json AFTER.json

Each shape of tests/cpu/shapes.py in a process of its own, on the stack of golden/releases.toml that has the release,
on a tiny model and a vLLM on the CPU. The table is the one in docs/notebooks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cpu.shapes import SHAPES
from tests.cpu.stack import environment_of, installed
from tests.golden.sources import ROOT, pinned, stacks, unpacked, wheel_cache

RELEASES = ("0.22.2", "1.16.0")
MODES = ("import", "compat")
TIME_LIMIT = 400  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--releases", nargs="+", default=RELEASES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", nargs="+", type=Path)
    parser.add_argument("--here", nargs=3, metavar=("SHAPE", "MODE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        shape, mode, out = arguments.here
        Path(out).write_text(json.dumps(run_here(shape, mode, Path(out).parent)))
        return 0
    if arguments.table:
        print(table([json.loads(path.read_text()) for path in arguments.table]))
        return 0
    unknown = set(arguments.shapes) - set(SHAPES)
    if unknown or arguments.out is None:
        parser.error(f"no such shape: {', '.join(sorted(unknown))}" if unknown else "--out is missing")
    names = [name for name in SHAPES if not arguments.shapes or name in arguments.shapes]
    wanted = [(name, release, mode) for release in arguments.releases for mode in arguments.modes for name in names]
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    with ThreadPoolExecutor(arguments.processes) as pool:
        for case, result in zip(wanted, pool.map(lambda case: run(*case), wanted), strict=True):
            found["/".join(case)] = result
            print("/".join(case), in_words(result), flush=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def run(name: str, release: str, mode: str) -> dict[str, Any]:
    """Run one shape in a process of its own with a TRL release."""
    pinned_release = pinned()[release]
    python = installed(stacks()[pinned_release.cpu])
    environ = environment_of(unpacked(pinned_release, wheel_cache()))
    with tempfile.TemporaryDirectory(prefix="shape-") as home:
        out = Path(home) / "report.json"
        environ |= {"XDG_CACHE_HOME": f"{home}/cache", "VLLM_CACHE_ROOT": str(python.parents[1] / "vllm-cache")}
        command = [str(python), "-m", "tests.cpu.notebook_shapes", "--here", name, mode, str(out)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return {"reached": [], "broke": {"cell": "?", "line": "", "error": f"not done in {TIME_LIMIT} s"}}
        if not out.is_file():
            return {"reached": [], "broke": {"cell": "?", "line": "", "error": done.stderr[-400:]}}
        report: dict[str, Any] = json.loads(out.read_text())
        return report


def run_here(name: str, mode: str, home: Path) -> dict[str, Any]:
    """Execute the cells of a shape one after another until one breaks."""
    import os

    from tests.cpu.notebook_runs import Watch, make_model
    from trlpatch.source.locate import find_trl

    shape = SHAPES[name]
    if find_trl().release < shape.since:
        return {"absent": f"needs TRL {'.'.join(map(str, shape.since))}"}
    os.chdir(home)
    cells: dict[str, Any] = {
        "__name__": "__main__",
        "MODEL": str(make_model(home, "shape")),
        "CPU_ENGINE": {"enforce_eager": True, "max_num_seqs": 32},
        "CPU_CONFIG": {"use_cpu": True, "bf16": False},
    }
    watch = Watch(cells)
    if mode == "compat":
        import inspect

        import trlpatch

        if "compat" not in inspect.signature(trlpatch.PatchFastRL).parameters:
            return {"absent": "PatchFastRL has no compat"}
        trlpatch.PatchFastRL(compat="on")
    report: dict[str, Any] = {"reached": [], "broke": None}
    for cell, source in shape.cells().items():
        place = f"{name}:{cell}"
        try:
            exec(compile(source, place, "exec"), cells)
        except Exception as error:
            at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
            line = source.splitlines()[at[-1] - 1].strip() if at and at[-1] else ""
            said = next((line for line in str(error).splitlines() if line), "")
            report["broke"] = {"cell": cell, "line": line, "error": f"{type(error).__name__}: {said[:240]}"}
            break
        report["reached"].append(cell)
    rollouts = [rollout for rollout in watch.rollouts if rollout["step"] is not None]
    report["rollouts"] = len(rollouts)
    report["live"] = bool(rollouts) and all("None" not in rollout["adapters"] for rollout in rollouts)
    report["gap"] = max((rollout["gap"] for rollout in rollouts), default=None)
    report["engine"] = getattr(cells.get("model"), "vllm_engine", None) is not None
    return report


def trained(result: dict[str, Any]) -> str:
    """Say whether it trained to the end, and on what."""
    if "absent" in result:
        return result["absent"]
    if "train" not in result["reached"]:
        return "no"
    if result["engine"] and not result["rollouts"]:
        return "**engine idle**"
    if not result["engine"]:
        return "yes, without an engine"
    return "yes" if result["live"] and result["gap"] < 1e-3 else "**not the policy**"


def in_words(result: dict[str, Any]) -> str:
    """Say how far one run came."""
    if "absent" in result:
        return str(result["absent"])
    broke = result["broke"]
    return f"{trained(result)}; {'all cells' if broke is None else ' | '.join(broke.values())}"


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rows for docs/notebooks.md: one per shape, release and mode, with a column pair per file."""
    lines = []
    for case in dict.fromkeys(case for run in runs for case in run):
        name, release, mode = case.split("/")
        row = [f"`{name}`", release, {"import": "import line", "compat": "and compat"}[mode]]
        for run in runs:
            result = run.get(case)
            if result is None or "absent" in result:
                row += ["", "" if result is None else result["absent"]]
                continue
            broke = result["broke"]
            row += [trained(result), "all cells" if broke is None else f"{broke['cell']}: {broke['error'][:110]}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
