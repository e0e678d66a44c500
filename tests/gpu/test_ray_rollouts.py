"""Rollouts on engines on other GPUs than the trainer's: `tox -e gpu`. Measured in tests/gpu/ray_rollouts.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.common import DRIFT, TOLERANCE, random_model, run_child

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("engines", "parallel"), [(1, 1), (3, 1), (1, 2)])
def test_stock_grpo_rolls_out_elsewhere_with_the_live_adapter(engines: int, parallel: int) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("ray")
    if torch.cuda.device_count() < 1 + engines * parallel:
        pytest.skip(f"needs {1 + engines * parallel} GPUs")
    words = [str(random_model("0.5b")), str(engines), str(parallel)]
    found = run_child(Path(__file__).with_name("ray_rollouts.py"), words, timeout=900)
    assert "error" not in found, found
    print(found)
    assert all(devices and "0" not in devices for devices in found["about"]["devices"])
    assert len(found["gaps"]) == 4
    assert max(found["gaps"]) < TOLERANCE
    assert found["gap"] < TOLERANCE
    assert found["gap_base"] > DRIFT, "the measure tells a rollout without the adapter"
