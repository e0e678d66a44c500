"""Every target of the installed TRL, patched before and after its import, in processes of their own.

TRLPATCH_TEST_TRL names a directory that holds another `trl` package, such as an unpacked wheel.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests import processes

REPOSITORY = Path(__file__).resolve().parents[2]
CHOSEN = os.environ.get("TRLPATCH_TEST_TRL", "")
LACKING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
if not CHOSEN and importlib.util.find_spec("trl") is None:
    LACKING.append("trl")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(bool(LACKING), reason=f"importing TRL's trainers needs {', '.join(LACKING)}"),
]


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_target_is_patched_and_returned(when: str, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), CHOSEN]))
    done = processes.run_module(
        "tests.runtime.real_trl",
        [when],
        env={**os.environ, "PYTHONPATH": path, "TRLPATCH_CACHE_DIR": str(tmp_path), "TRL_EXPERIMENTAL_SILENCE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")
