"""The command line, run as a process of its own on the small TRL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.small_trl import FILES, GRPO, ROOT, Run


@pytest.fixture
def trl(tmp_path: Path) -> Path:
    """A directory that holds the small TRL."""
    for name, text in FILES.items():
        path = tmp_path / "site" / "trl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "site"


@pytest.fixture
def trlpatch(tmp_path: Path) -> Run:
    """Run `python -m trlpatch <words>` with the small TRL, where there is one, on sys.path."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-m", "trlpatch", *map(str, words)],
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "TRLPATCH_CACHE_DIR": str(tmp_path / "cache"), **environment},
            check=False,
            timeout=300,
            cwd=tmp_path,
        )

    return run


@pytest.fixture
def drifted(trl: Path) -> Path:
    """The small TRL with a rollout call that the patches do not expect."""
    path = trl / "trl" / "trainer" / "grpo_trainer.py"
    extra = "        more = self.llm.generate(prompts)\n        return outputs"
    path.write_text(GRPO.replace("        return outputs", extra), encoding="utf-8")
    return trl


@pytest.fixture
def script(trl: Path, tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write
