"""Full weights to an engine on another GPU; measured and judged in tests/gpu/ray_weights.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.common import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("parallel", [1, 2])
def test_grpo_that_trains_every_weight_rolls_out_on_another_gpu(parallel: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("ray")
    if torch.cuda.device_count() < 1 + parallel:
        pytest.skip(f"needs {1 + parallel} GPUs")
    words = ["--out", str(tmp_path / "weights.json"), "--parallel", str(parallel)]
    command = [sys.executable, "-m", "tests.gpu.ray_weights", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
