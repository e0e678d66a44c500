"""How far the shapes of public RL notebooks get with the import line replaced, with and without `compat`.

    python -m tests.cpu.notebook_shapes --out RUNS.json [--releases 0.22.2 1.16.0] [--modes import compat] [SHAPE ...]
    python -m tests.cpu.notebook_shapes --table BEFORE.json AFTER.json

Each shape of tests/cpu/shapes.py in a process of its own, on the stack of golden/releases.toml that has the release,
on a tiny model and a vLLM on the CPU; the releases beside each other. The table is the one in docs/notebooks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
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
LONGEST = 90  # characters of an error in the table
LOST = {"reached": [], "broke": {"cell": "?", "line": "", "error": "the process ended without a report"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--releases", nargs="+", default=RELEASES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--table", nargs="+", type=Path)
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(path.read_text()) for path in arguments.table]))
        return 0
    unknown = set(arguments.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    names = [name for name in SHAPES if not arguments.shapes or name in arguments.shapes]
    cases = [(name, mode) for name in names for mode in arguments.modes]
    if arguments.here:
        run_each(cases, arguments.here)
        return 0
    if arguments.out is None:
        parser.error("--out is missing")
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    with ThreadPoolExecutor() as pool:
        for results in pool.map(lambda release: run(release, names, arguments.modes), arguments.releases):
            found |= results
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def run(release: str, names: list[str], modes: list[str]) -> dict[str, Any]:
    """Run shapes with one TRL release, in one interpreter that forks for each."""
    pinned_release = pinned()[release]
    python = installed(stacks()[pinned_release.cpu])
    environ = environment_of(unpacked(pinned_release, wheel_cache()))
    found = {}
    with tempfile.TemporaryDirectory(prefix="shapes-") as home:
        environ |= {"XDG_CACHE_HOME": f"{home}/cache", "VLLM_CACHE_ROOT": str(python.parents[1] / "vllm-cache")}
        command = [str(python), "-m", "tests.cpu.notebook_shapes", "--here", home, "--modes", *modes, "--", *names]
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                name, mode = line.split()
                out = Path(home) / name / mode / "report.json"
                result = json.loads(out.read_text()) if out.is_file() else dict(LOST)
                found[f"{name}/{release}/{mode}"] = result
                print(f"{name}/{release}/{mode}", in_words(result), flush=True)
    return found


def run_each(cases: list[tuple[str, str]], home: Path) -> None:
    """Import once what takes long, then run each case in a fork of this process and print its name when it is done."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    import vllm  # noqa: F401

    for name, mode in cases:
        place = home / name / mode
        place.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 1
            try:
                (place / "report.json").write_text(json.dumps(run_here(name, mode, place)))
                status = 0
            finally:
                os._exit(status)
        deadline = time.monotonic() + TIME_LIMIT
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.1)
        print(name, mode, flush=True)


def run_here(name: str, mode: str, home: Path) -> dict[str, Any]:
    """Execute the cells of a shape one after another until one breaks."""
    from tests.cpu.notebook_runs import Watch, main_module, make_model
    from trlpatch.source.locate import find_trl

    shape = SHAPES[name]
    if find_trl().release < shape.since:
        return {"absent": f"needs TRL {'.'.join(map(str, shape.since))}"}
    os.chdir(home)
    cells = main_module()
    cells["MODEL"] = str(make_model(home, "shape"))
    cells["CPU_ENGINE"] = {"enforce_eager": True, "max_num_seqs": 32}
    cells["CPU_CONFIG"] = {"use_cpu": True, "bf16": False}
    watch = Watch(cells)
    if mode == "compat":
        import inspect

        import trlpatch

        if "compat" not in inspect.signature(trlpatch.PatchFastRL).parameters:
            return {"absent": "PatchFastRL has no compat"}
        trlpatch.PatchFastRL(compat="on")
    report: dict[str, Any] = {"reached": [], "broke": None}
    for cell, source in shape.cells().items():
        if mode == "compat":  # a notebook with a call of its own gets it there
            source = source.replace("FastLanguageModel)\n", 'FastLanguageModel, compat="on")\n', 1)
        place = f"{name}:{cell}"
        try:
            exec(compile(source, place, "exec"), cells)
        except Exception as error:
            at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
            line = source.splitlines()[at[-1] - 1].strip() if at and at[-1] else ""
            cause: BaseException = error
            while cause.__cause__ is not None:  # transformers' and TRL's lazy modules wrap what they meet
                cause = cause.__cause__
            said = next((line for line in str(cause).splitlines() if line), "")
            report["broke"] = {"cell": cell, "line": line, "error": f"{type(cause).__name__}: {said[:240]}"}
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
    """Return the table for docs/notebooks.md: a row per shape and release, a column per file and mode in it."""
    columns = [(run, mode) for run in runs for mode in MODES if any(case.endswith(f"/{mode}") for case in run)]
    releases = sorted(
        {case.split("/")[1] for run in runs for case in run}, key=lambda text: [*map(int, text.split("."))]
    )
    lines = []
    for name in SHAPES:
        for release in releases:
            cells = [cell_of(run.get(f"{name}/{release}/{mode}")) for run, mode in columns]
            lines.append("| " + " | ".join([f"`{name}`", release, *cells]) + " |")
    return "\n".join(lines)


def cell_of(result: dict[str, Any] | None) -> str:
    """Say in a cell of the table how far a run came, and the first thing that broke."""
    if result is None or "absent" in result:
        return "-" if result is None else str(result["absent"])
    broke = result["broke"]
    if broke is None:
        return trained(result).replace("yes", "**all cells**")
    error = re.sub(r" \(/[^)]*\)|\w+\.__init__\(\) got an |FastLanguageModel\.from_pretrained: ", "", broke["error"])
    short = error if len(error) <= LONGEST else f"{error[:LONGEST]}…"
    return f"{'' if trained(result) == 'no' else 'trains; '}{broke['cell']}: {short}".replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
