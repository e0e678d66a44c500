"""Shared base weights, architecture by architecture; measured and judged in tests/gpu/sharing_archs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.common import run_child
from tests.gpu.sharing_archs import ARCHITECTURES, failures

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_and_trainer_share_one_copy_and_stay_equal(name: str) -> None:
    found = run_child(Path(__file__).with_name("sharing_archs.py"), [name], timeout=180)
    assert failures(found) == [], found
