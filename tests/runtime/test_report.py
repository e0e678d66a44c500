"""What `print(report)` and a rich console show of a report."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from trlpatch.outcomes import Outcome
from trlpatch.runtime.report import PatchReport


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever engines other tests of this process have left."""
    monkeypatch.delitem(sys.modules, "trlpatch.engine.state", raising=False)


REPORT = PatchReport(
    trl="1.16.0",
    entries=(
        Outcome("grpo", "sampling", "applied", variant=">=0.28"),
        Outcome("grpo", "engine_reuse", "skipped", "the engine is built in VLLMGeneration"),
        Outcome(
            "grpo_config", "sampling_config", "failed", "no [anchor] was found, and this reason is a long one " * 3
        ),
    ),
    files={"grpo": f"/cache/{'0' * 64}/grpo_trainer.py"},
    modules={"grpo": "no.such.module"},
    cache={"grpo": "hit"},
    milliseconds=12.3,
    unfixable=("mine.Trainer: defined before",),
    notes=("untested release: TRL 1.16.0",),
)

TEXT = f"""\
trlpatch: TRL 1.16.0, 1 patches applied, 12 ms

TARGET       PATCH            STATUS   DETAIL
grpo         sampling         applied  fits trl >=0.28
grpo         engine_reuse     skipped  the engine is built in VLLMGeneration
grpo_config  sampling_config  failed   {REPORT.entries[2].reason.rstrip()}

TARGET  CACHE  FILE THAT RUNS
grpo    hit    /cache/{"0" * 64}/grpo_trainer.py

out of reach:
  mine.Trainer: defined before

notes:
  untested release: TRL 1.16.0"""


def on_console(report: PatchReport, **settings: object) -> str:
    console = Console(file=io.StringIO(), **settings)  # type: ignore[arg-type]
    console.print(report)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_text_has_a_line_per_patch_and_file_however_long() -> None:
    assert str(REPORT) == TEXT


def test_a_wide_console_shows_the_same_words() -> None:
    shown = on_console(REPORT, width=400, highlight=False)
    assert "\n".join(line.rstrip() for line in shown.rstrip().splitlines()) == TEXT


def test_cells_fold_at_80_columns_and_lose_nothing() -> None:
    shown = on_console(REPORT, width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "[anchor]" in shown
    assert "".join(str(REPORT).split()).count("0" * 64) == 1
    assert "0" * 64 in "".join(shown.split())


def test_the_status_is_coloured_where_colours_are() -> None:
    shown = on_console(REPORT, width=80, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[32mapplied" in shown
    assert "\x1b[31mfailed" in shown


def test_a_disabled_report_is_one_line() -> None:
    line = "trlpatch: disabled by TRLPATCH_DISABLE, TRL is stock"
    report = PatchReport(disabled=True)
    assert str(report) == line
    assert on_console(report, width=80) == f"{line}\n"
