"""One plain line where stderr is no terminal, stages where it is."""

from __future__ import annotations

import pytest

from trlpatch.loading.memory import GIB
from trlpatch.loading.progress import Progress


def test_a_file_gets_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    show = Progress("Qwen/[x]")
    with show.stage("building the engine"):
        pass
    show.done(int(1.5 * GIB), "GPU memory", ["bfloat16", "base weights shared"])
    seen = capsys.readouterr()
    assert seen.out == ""
    (line,) = seen.err.splitlines()
    assert line.startswith("trlpatch: Qwen/[x] ready in ")
    assert line.endswith(" s, 1.5 GiB of GPU memory: bfloat16, base weights shared")


def test_a_terminal_sees_the_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show = Progress("m")
    with show.stage("building the engine"):
        pass
    assert "building the engine" in capsys.readouterr().err
