"""Tests of Triton kernels on a CPU: a test file that runs itself again under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_under_the_interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="would start itself")


def run_interpreted(file: str) -> None:
    """Run the test file in a process whose kernels are interpreted: Triton asks when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
