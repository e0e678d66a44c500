"""docs/matrix.json, docs/matrix.md and the package's summary: one list of runs, merged, sorted, rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.sources import pinned
from tests.matrix.__main__ import main
from tests.matrix.reasons import REASONS, reason_of
from tests.matrix.render import counted, render
from tests.matrix.runs import MATRIX, SUMMARY, BadRun, Run, load, merge, run_of, summary, write
from trlpatch.source.releases import ReleaseRange, parse_release

STACKS = {
    "tf4": {"vllm": "0.23.0", "transformers": "4.57.6", "torch": "2.11.0"},
    "tf5": {"vllm": "0.26.0", "transformers": "5.17.0", "torch": "2.11.0"},
    "cpu5": {"vllm": "0.28.0", "transformers": "5.23.0", "torch": "2.13.0"},
    "other": {"vllm": "0.15.1", "transformers": "4.56.2", "torch": "2.10.0"},
}


def run(trl: str = "0.23.1", stack: str = "tf4", **changes: Any) -> Run:
    entry: dict[str, Any] = {
        "trl": trl,
        "case": "grpo-lora",
        "device": "cpu" if stack.startswith(("cpu", "other")) else "gpu",
        "stack": stack,
        "versions": STACKS[stack],
        "date": "2026-11-21",
        "command": f"python tests/gpu/matrix.py {trl}",
        "stock": False,
        "verdict": "pass",
        "steps": 10,
        "gap_max": 0.0066,
        "control": 0.13,
        "rewards": [0.5, 0.9],
        "sleep": "1",
        "seconds": 31.2,
        **changes,
    }
    return run_of(entry)


NOTHING: dict[str, Any] = {"steps": 0, "gap_max": None, "control": None, "rewards": None, "sleep": ""}
NOT_RUN: dict[str, Any] = {**NOTHING, "verdict": "error"}
STOCK_ERROR: dict[str, Any] = {**NOT_RUN, "stock": True, "error": "cannot import name 'GuidedDecodingParams'"}


def test_runs_survive_the_file(tmp_path: Path) -> None:
    runs = [run(), run("1.16.0", "cpu5", sleep="", note="x"), run(**STOCK_ERROR)]
    write(tmp_path / "matrix.json", runs)
    assert load(tmp_path / "matrix.json") == merge(runs)
    assert load(tmp_path / "none.json") == []


def test_runs_are_sorted_by_device_vllm_case_and_release_not_by_text() -> None:
    mixed = [
        run("1.9.2", "cpu5"),
        run("1.10.0", "tf5"),
        run("1.9.2", "tf5"),
        run("1.9.2", "tf5", case="rloo-lora"),
        run("1.9.2", "tf4"),
        run("1.9.2", "tf4", stock=True),
    ]
    order = [(each.stack, each.case, each.trl, each.stock) for each in merge(mixed)]
    assert order == [
        ("tf4", "grpo-lora", "1.9.2", True),
        ("tf4", "grpo-lora", "1.9.2", False),
        ("tf5", "grpo-lora", "1.9.2", False),
        ("tf5", "grpo-lora", "1.10.0", False),
        ("tf5", "rloo-lora", "1.9.2", False),
        ("cpu5", "grpo-lora", "1.9.2", False),
    ]


def test_of_runs_with_one_key_the_newest_stays_and_of_one_day_the_last() -> None:
    old, new, again = run(seconds=1.0), run(date="2026-11-22", seconds=2.0), run(date="2026-11-22", seconds=3.0)
    assert merge([new], [old]) == [new]
    assert merge([new], [again]) == [again]
    assert merge([again], [new]) == [new]
    assert len(merge([old], [run(stock=True)], [run(stack="tf5")], [run("0.23.0")], [run(case="rloo-lora")])) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trl": "unknown"}, "unknown"),
        ({"date": "yesterday"}, "yesterday"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"verdict": "ok"}, "verdict is 'ok'"),
        ({"verdict": "wrong"}, "stock"),
        ({"verdict": "error"}, "last line"),
        ({"gap_max": None}, "nothing was measured"),
        ({"versions": {"vllm": "0.23.0"}}, "transformers"),
        ({"colour": "green"}, "unknown fields: colour"),
    ],
)
def test_a_run_without_the_format_is_refused_with_its_place(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**run().to_dict(), **changes}
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([run().to_dict(), entry]), encoding="utf-8")
    with pytest.raises(BadRun, match="run 1") as caught:
        load(path)
    assert words in str(caught.value)
    assert main(["add", str(tmp_path / "matrix.json"), str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "matrix.json").exists()


def test_missing_fields_are_named() -> None:
    entry = run().to_dict()
    del entry["command"], entry["sleep"]
    with pytest.raises(BadRun, match="without command, sleep"):
        run_of(entry)


def test_add_merges_writes_and_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix, first, second = tmp_path / "matrix.json", tmp_path / "a.json", tmp_path / "b.json"
    write(first, [run()])
    write(second, [run(seconds=9.0), run("1.16.0", "tf5")])
    assert main(["add", str(matrix), str(first), str(second)]) == 0
    assert [(each.trl, each.seconds) for each in load(matrix)] == [("0.23.1", 9.0), ("1.16.0", 31.2)]
    assert (tmp_path / "matrix.md").read_text(encoding="utf-8") == render(load(matrix))
    assert "2 runs" in capsys.readouterr().out


def test_add_refuses_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add", str(tmp_path / "matrix.json"), str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err


def test_add_says_what_has_no_reason_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.json", [run(**{**STOCK_ERROR, "error": "Never seen"}), run("0.24.0", **STOCK_ERROR)])
    main(["add", str(tmp_path / "matrix.json"), str(tmp_path / "a.json")])
    told = [line for line in capsys.readouterr().out.splitlines() if "no reason" in line]
    assert len(told) == 1
    assert "stock grpo-lora on 0.23.1: Never seen" in told[0]


def test_the_document_has_a_row_per_release_and_columns_for_stock_and_patched_per_stack() -> None:
    wrong: dict[str, Any] = {"stock": True, "verdict": "wrong", "gap_max": 0.738, "control": None}
    text = render([run(), run(**STOCK_ERROR), run("1.9.2"), run("1.9.2", **wrong), run("1.9.2", "tf5", gap_max=2e-7)])
    table = text.partition("## GRPO, LoRA on an attached engine")[2].partition("##")[0].strip().splitlines()
    columns = "GPU, vLLM 0.23.0, transformers 4.57.6: stock | GPU, vLLM 0.23.0, transformers 4.57.6: trlpatch"
    assert table[0] == f"| TRL | {columns} | GPU, vLLM 0.26.0, transformers 5.17.0: trlpatch |"
    assert table[2:] == [
        "| 0.23.1 | fails (A) | **0.0066**, control 0.13, sleep 1 | · |",
        "| 1.9.2 | wrong 0.74, sleep 1 (B) | **0.0066**, control 0.13, sleep 1 | **2.0e-07**, control 0.13, sleep 1 |",
    ]


def test_versions_that_nothing_pins_are_rows_of_a_table_of_their_own_and_no_columns() -> None:
    others = [run("0.22.2", "other", sleep=""), run("1.16.0", "other", **NOT_RUN, error="Never seen")]
    text = render([run(), *others])
    table = text.partition("## Other versions")[2].partition("\n## ")[0].strip().splitlines()
    where = "CPU, vLLM 0.15.1, transformers 4.56.2"
    assert table[-2:] == [
        f"| {where} | 0.22.2 | GRPO, LoRA on an attached engine | **0.0066**, control 0.13 |",
        f"| {where} | 1.16.0 | GRPO, LoRA on an attached engine | fails (A) |",
    ]
    assert where not in text.partition("## Other versions")[0]
    assert f"### {where}" in text
    assert "- **A** (1.16.0)" in text


def test_cases_come_by_trainer_and_unknown_ones_last() -> None:
    cases = ["new-lora", "rloo-lora", "grpo-full", "grpo-new", "grpo-lora"]
    titles = [line for line in render([run(case=case) for case in cases]).splitlines() if line.startswith("## ")]
    assert titles[1:6] == [
        "## GRPO, LoRA on an attached engine",
        "## GRPO, all weights",
        "## GRPO, new",
        "## RLOO, LoRA on an attached engine",
        "## new, LoRA on an attached engine",
    ]


def test_reasons_are_listed_once_with_releases_and_upstreams_link() -> None:
    text = render([run("0.23.1", **STOCK_ERROR), run("0.18.2", **STOCK_ERROR)])
    (line,) = [line for line in text.splitlines() if line.startswith("- **A**")]
    assert "(0.18.2, 0.23.1)" in line
    assert "https://github.com/" in line


def test_counts_say_how_many_ran_and_how_many_of_them_were_right() -> None:
    stock = [
        run("0.23.1", **STOCK_ERROR),
        run("0.24.0", stock=True),
        run("0.25.1", stock=True, verdict="wrong", gap_max=0.7),
    ]
    assert counted([*stock, run("0.23.1"), run("0.24.0")]) == "stock runs 2 of 3, right 1; trlpatch runs 2 of 2"
    assert counted([run(), run("0.24.0", verdict="fail")]) == "trlpatch runs 1 of 2"
    assert counted([]) == ""


def test_versions_dates_and_commands_are_given_per_stack() -> None:
    text = render([run(), run("1.9.2", date="2026-11-22"), run("1.16.0", "cpu5")])
    origins = text.partition("## Versions and commands")[2]
    assert "torch 2.11.0; 2026-11-21 to 2026-11-22." in origins
    assert origins.count("python tests/gpu/matrix.py RELEASE") == 2, "one command a stack, whatever the release"


def test_reasons_hold_for_some_release_and_are_sourced() -> None:
    releases = [parse_release(version) for version in pinned()]
    for reason in REASONS:
        assert any(release in ReleaseRange(reason.trl) for release in releases), reason.text
        assert reason.link.startswith("https://"), reason.text


def test_every_run_that_is_not_green_has_a_reason() -> None:
    unexplained = [
        (each.trl, each.case, each.stack, each.stock, each.error or each.note)
        for each in load(MATRIX)
        if each.verdict != "pass" and reason_of(each) is None
    ]
    assert unexplained == [], "add the reason, with upstream's link, to tests/matrix/reasons.py"


def test_what_is_checked_in_is_up_to_date() -> None:
    runs = load(MATRIX)
    again = "Run: python -m tests.matrix render"
    assert MATRIX.with_suffix(".md").read_text(encoding="utf-8") == render(runs), again
    assert json.loads(SUMMARY.read_text(encoding="utf-8")) == summary(runs), again
    assert runs == merge(runs)


def test_the_summary_leaves_stock_runs_out() -> None:
    found = summary([run(), run(**STOCK_ERROR), run(case="grpo-liger", date="2026-11-22", **NOT_RUN, error="x")])
    assert found == [
        {
            "trl": "0.23.1",
            "vllm": "0.23.0",
            "transformers": "4.57.6",
            "device": "gpu",
            "passed": ["grpo-lora"],
            "failed": ["grpo-liger"],
            "date": "2026-11-22",
        }
    ]
