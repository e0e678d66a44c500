"""Everything here needs a CUDA device with vLLM; anywhere else it is skipped, in one place."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or find_spec("vllm") is None:
        pytest.skip("needs a CUDA device with vLLM")
