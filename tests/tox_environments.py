"""What tox says of itself, as tests read it."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

from tests.golden.sources import ROOT


@functools.cache
def told(*arguments: str) -> str:
    """Return what `tox <arguments>` prints."""
    command = [sys.executable, "-m", "tox", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environments() -> dict[str, str]:
    """Return every environment with its description."""
    return dict(re.findall(r"^(\S+) +-> (.*)$", told("list"), re.MULTILINE))


def by_default() -> list[str]:
    """Return what a plain `tox` runs, in this order."""
    return re.findall(r"^(\S+) +->", told("list").partition("additional environments:")[0], re.MULTILINE)
