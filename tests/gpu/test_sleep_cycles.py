"""Sleep and wake by themselves; measured and judged in tests/gpu/sleep_cycles.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.common import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", [[], ["--graphs"]], ids=["eager", "graphs"])
def test_twenty_sleeps_and_everything_that_has_to_raise(mode: list[str], tmp_path: Path) -> None:
    script = Path(__file__).with_name("sleep_cycles.py")
    command = [sys.executable, str(script), "--out", str(tmp_path / "cycles.json"), *mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
