"""What `print(report)`, a rich console and a notebook show of a report, in summary and in full."""

from __future__ import annotations

import io
import json
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


SUMMARY = """\
trlpatch: TRL 1.16.0, 1 patches applied, 12 ms
  trainers   grpo
  failed     sampling_config on grpo_config: no [anchor] was found, and this
             reason is a long one no [anchor] was found, and this reason is a
             long one no [anchor] was found, and this reason ...
  skipped    engine_reuse on grpo: the engine is built in VLLMGeneration
  no reach   out of reach: mine.Trainer: defined before
  note       untested release: TRL 1.16.0
  all of it  print(trlpatch.status().full())"""


def on_console(shown: object, **settings: object) -> str:
    console = Console(file=io.StringIO(), **settings)  # type: ignore[arg-type]
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def bare(shown: str) -> str:
    return "\n".join(line.rstrip() for line in shown.rstrip().splitlines())


def test_the_summary_groups_and_folds_at_80_columns() -> None:
    assert str(REPORT) == SUMMARY


def test_the_summary_of_a_whole_release_is_ten_lines() -> None:
    moved = ("engine_reuse", "adapter_sync", "live_adapter", "sleep")
    trainers = ("grpo", "rloo", "online_dpo", "gold", "distillation", "sdpo", "sdft", "iw_opd")
    entries = [Outcome("vllm_generation", name, "applied") for name in moved]
    for name in trainers:
        entries += [Outcome(name, "configure", "applied"), Outcome(f"{name}_config", "sampling_config", "applied")]
        entries += [Outcome(name, patch, "skipped", f"{patch} is in VLLMGeneration") for patch in moved]
    lines = str(PatchReport(trl="1.16.0", entries=tuple(entries), absent={"openenv": "gone"})).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    assert lines[1] == f"  trainers   {', '.join(trainers)}"
    assert lines[2] == "  with       vllm_generation, 8 configs"
    assert not any("skipped" in line for line in lines), "what is done in another file is done"
    without = [entry for entry in entries if (entry.patch, entry.status) != ("sleep", "applied")]
    left = str(PatchReport(trl="1.16.0", entries=tuple(without)))
    assert f"  skipped    sleep on {trainers[0]}" in left
    assert lines[-2] == "  absent     not in this TRL: openenv"


def test_many_failures_are_counted() -> None:
    entries = tuple(Outcome("grpo", f"patch{number}", "failed", "gone") for number in range(9))
    shown = str(PatchReport(trl="1.16.0", entries=entries, files={"grpo": "grpo_trainer.py"}))
    assert shown.count("failed") == 4
    assert "and 6 more" in shown
    assert "  stock      grpo\n" in shown


def test_a_console_shows_the_same_summary_folded_at_its_width() -> None:
    assert bare(on_console(REPORT, width=80)) == SUMMARY
    shown = on_console(REPORT, width=60)
    assert max(map(len, shown.splitlines())) <= 60
    assert "[anchor]" in shown
    assert " ".join(SUMMARY.split()) == " ".join(shown.split())


def test_a_notebook_shows_a_table_with_everything_behind_it() -> None:
    text = "<b> was not found"
    shown = PatchReport(trl="1.16.0", entries=(Outcome("grpo", "sleep", "failed", text),))._repr_html_()
    assert shown.count("<table>") == shown.count("<details>") == 1
    assert "&lt;b&gt; was not found" in shown
    assert "<b>" not in shown
    assert "TARGET  PATCH" in shown
    assert PatchReport()._repr_html_() == "<div>trlpatch: not patched; no engine</div>"
    assert REPORT.full()._repr_html_().startswith("<pre>trlpatch: TRL 1.16.0")


def test_the_full_text_has_a_line_per_patch_and_file_however_long() -> None:
    assert str(REPORT.full()) == TEXT


def test_a_wide_console_shows_the_same_words_in_full() -> None:
    assert bare(on_console(REPORT.full(), width=400, highlight=False)) == TEXT


def test_cells_fold_at_80_columns_and_lose_nothing() -> None:
    shown = on_console(REPORT.full(), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "[anchor]" in shown
    assert "".join(str(REPORT.full()).split()).count("0" * 64) == 1
    assert "0" * 64 in "".join(shown.split())


def test_the_status_is_coloured_where_colours_are() -> None:
    shown = on_console(REPORT.full(), width=80, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[32mapplied" in shown
    assert "\x1b[31mfailed" in shown


def test_a_disabled_report_is_one_line() -> None:
    line = "trlpatch: disabled by TRLPATCH_DISABLE, TRL is stock"
    report = PatchReport(disabled=True)
    assert str(report) == str(report.full()) == line
    assert on_console(report, width=80) == f"{line}\n"


@pytest.mark.parametrize(
    ("engines", "counted"), [((), "no engine"), (("tiny, attached",), "1 engine"), (("a", "b"), "2 engines")]
)
def test_a_report_of_nothing_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch, engines: tuple[str, ...], counted: str
) -> None:
    monkeypatch.setattr(PatchReport, "engines", engines)
    shown = str(PatchReport()).splitlines()
    assert shown[0] == f"trlpatch: not patched; {counted}"
    assert shown[1:-1] == [f"  engine     {engine}" for engine in engines]
    assert ("call trlpatch.PatchFastRL()" in str(PatchReport())) == bool(engines)
    assert json.loads(json.dumps(PatchReport().to_dict()))["engines"] == list(engines)


def test_a_report_is_true_where_patches_are_in_force() -> None:
    assert REPORT
    for report in (
        PatchReport(),
        PatchReport(disabled=True),
        PatchReport(trl="1.16.0", entries=(Outcome("grpo", "sleep", "failed", "gone"),)),
    ):
        assert not report
        assert report.to_dict()["patched"] is False
    assert REPORT.to_dict()["patched"] is True
