"""Every page's code blocks, run as they stand, with a real vLLM engine and the TRL release that can be imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.docs.pages import imports_torch, pages, path_of, runnable
from tests.golden.sources import wheel_cache
from trlpatch.source.locate import find_trl

pytest.importorskip("vllm")

pytestmark = [pytest.mark.cpu, pytest.mark.release]

CONVERTER = wheel_cache() / "gguf"
"""llama.cpp's converter is fetched once a machine; every test has a home of its own."""

FRESH = "README.md"
"""Runs in an interpreter of its own, as a reader's would. Of the others those start warm that import torch."""

PAGES = [page for page in pages() if runnable(page)]


@pytest.mark.skipif(find_trl().release < (1, 16), reason="pages are written for the newest tested TRL")
@pytest.mark.parametrize("page", PAGES, ids=path_of)
def test_a_page_runs_as_pasted(page: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "COLUMNS": "100"}
    if "trlpatch export gguf" in page.read_text(encoding="utf-8"):
        environ["TRLPATCH_CACHE_DIR"] = str(CONVERTER)
    module, words = "tests.docs.run_page", [path_of(page), str(tmp_path)]
    if path_of(page) == FRESH or not imports_torch(page):
        done = processes.run([sys.executable, "-m", module, *words], env=environ, timeout=900)
    else:
        done = processes.run_module(module, words, env=environ, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
