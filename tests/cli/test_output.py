"""What list, plan, diff, dump, status and cache print, on a terminal and where there is none."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import pytest

from tests.cli.small_trl import GRPO, ROOT, TARGETS, Run, fails, in_terminal, install


def test_status_ends_with_the_verdict_on_versions(trl: Path, trlpatch: Run) -> None:
    install(trl, vllm="0.30.0", transformers="5.19.0")
    done = trlpatch("status")
    assert done.returncode == 0
    assert "versions   untested: TRL 0.18.2, vLLM 0.30.0, transformers 5.19.0" in done.stdout
    assert json.loads(trlpatch("status", "--json").stdout)["verdict"]["state"] == "untested"


def test_diff_applies_to_the_upstream_text(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    diff = trlpatch("diff", "grpo", "--trl-path", trl)
    assert (diff.returncode, diff.stderr) == (0, "")
    assert diff.stdout.startswith("--- a/trl/trainer/grpo_trainer.py\n+++ b/trl/trainer/grpo_trainer.py\n")
    assert trlpatch("dump", "grpo", "--out", "out", "--trl-path", trl).returncode == 0
    dumped = tmp_path / "out" / "0.18.2" / "trl" / "trainer" / "grpo_trainer.py"
    removed = {line[1:] for line in diff.stdout.splitlines() if re.match("-(?!--)", line)}
    added = {line[1:] for line in diff.stdout.splitlines() if re.match(r"\+(?!\+\+)", line)}
    assert removed <= set(GRPO.splitlines())
    assert set(dumped.read_text(encoding="utf-8").splitlines()) == (set(GRPO.splitlines()) - removed) | added


def test_diff_is_coloured_only_where_wanted(trl: Path, trlpatch: Run) -> None:
    words = ["diff", "grpo", "--trl-path", trl]
    coloured = trlpatch(*words, FORCE_COLOR="1").stdout
    plain = trlpatch(*words).stdout
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert trlpatch(*words, FORCE_COLOR="1", NO_COLOR="1").stdout == plain


@pytest.mark.parametrize("words", [["list"], ["plan", "grpo"], ["check"], ["status"]])
def test_rows_are_whole_lines_without_colour_where_stdout_is_no_terminal(
    trl: Path, trlpatch: Run, words: list[str]
) -> None:
    shown = trlpatch(*words, COLUMNS="40").stdout
    assert max(map(len, shown.splitlines())) > 80
    assert "\x1b[" not in shown
    assert not re.search(r" $", shown, re.MULTILINE)
    assert trlpatch(*words, COLUMNS="200").stdout == shown


def test_a_terminal_gets_colours_and_cells_folded_at_its_width(trl: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{trl}{os.pathsep}{ROOT}", "TERM": "xterm"}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        environment.pop(name, None)
    shown = in_terminal(["plan", "grpo"], environment, columns=60)
    assert "\x1b[1mgrpo\x1b[0m" in shown
    rows = [line for line in re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines() if line.startswith("    ")]
    assert len(rows) > 8
    assert max(map(len, rows)) <= 60
    assert "\x1b[" not in in_terminal(["plan", "grpo"], {**environment, "NO_COLOR": "1"}, columns=60)


def test_diff_exits_1_on_drift_and_prints_what_fits(drifted: Path, trlpatch: Run) -> None:
    result = trlpatch("diff", "--trl-path", drifted)
    fails(result, 1, "rollout_call: expected 1, found 2")
    assert "b/trl/trainer/online_dpo_trainer.py" in result.stdout
    assert "b/trl/trainer/grpo_trainer.py" not in result.stdout


def test_dump_prints_the_paths_it_wrote(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    result = trlpatch("dump", "--out", tmp_path / "out", "--trl-path", trl)
    written = [Path(line) for line in result.stdout.splitlines()]
    assert {path.name.removesuffix("_trainer.py").removesuffix(".py") for path in written} == set(TARGETS)
    assert all("# trlpatch: " in path.read_text(encoding="utf-8") for path in written)


def test_dump_into_a_file_is_refused(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    fails(trlpatch("dump", "--out", "out", "--trl-path", trl), 2, "out")


def test_dump_writes_nothing_on_drift(drifted: Path, trlpatch: Run, tmp_path: Path) -> None:
    fails(trlpatch("dump", "--out", "out", "--trl-path", drifted), 1, "rollout_call")
    assert not (tmp_path / "out").exists()


def test_plan_shows_variants_and_skips(trl: Path, trlpatch: Run) -> None:
    result = trlpatch("plan", "grpo", "--trl-path", trl, "--skip", "sampling")
    assert result.returncode == 0, result.stderr
    assert re.search(r"live_adapter +fits trl >=0\.18,<0\.25", result.stdout)
    assert re.search(r"sampling +left out by skip", result.stdout)
    assert re.search(r'logps +off; on with PatchFastRL\(logps="chunked"\), here --logps chunked$', result.stdout, re.M)
    asked = trlpatch("plan", "grpo", "--trl-path", trl, "--json", "--logps", "chunked")
    assert json.loads(asked.stdout)["files"][0]["off"] == {}


def test_list_names_every_patch(trlpatch: Run) -> None:
    from trlpatch.rewrite.registry import patches

    names = [patch.name for patch in patches()]
    listed = trlpatch("list").stdout
    assert [line.split()[0] for line in listed.splitlines() if not line.startswith(" ")] == names
    assert [entry["patch"] for entry in json.loads(trlpatch("list", "--json").stdout)] == names


def test_status_before_and_after_patching(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    before = json.loads(trlpatch("status", "--json").stdout)
    assert before["cached"] == dict.fromkeys(TARGETS, False)
    assert (before["trl"], before["cache"], before["cache_writable"]) == ("0.18.2", str(tmp_path / "cache"), True)
    (tmp_path / "nothing.py").write_text("", encoding="utf-8")
    assert trlpatch("run", "nothing.py").returncode == 0
    after = json.loads(trlpatch("status", "--json").stdout)
    assert after["cached"] == dict.fromkeys(TARGETS, True)
    assert after["cache_bytes"] > 0
    shown = trlpatch("status", TRLPATCH_DISABLE="1").stdout
    assert "TRLPATCH_DISABLE is set" in shown
    assert "TRLPATCH_DISABLE is set" not in trlpatch("status", TRLPATCH_DISABLE="off").stdout
    fails(trlpatch("status", TRLPATCH_DISABLE="nope"), 2, "TRLPATCH_DISABLE='nope': expected 1 or 0")
    assert f"loading    FastLanguageModel: {'; '.join(after['loading']) or 'everything'}" in shown


def test_cache_path_and_clear(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    assert trlpatch("cache", "path").stdout == f"{tmp_path / 'cache'}\n"
    (tmp_path / "nothing.py").write_text("", encoding="utf-8")
    trlpatch("run", "nothing.py")
    assert trlpatch("cache", "clear").stdout == f"deleted 5 entries of {tmp_path / 'cache'}\n"
    assert trlpatch("cache", "clear").stdout == f"deleted 0 entries of {tmp_path / 'cache'}\n"


def test_a_plan_can_be_written_as_a_page(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    done = trlpatch("plan", "grpo", "--trl-path", trl, "--html", "plan.html")
    assert (done.returncode, done.stdout) == (0, "plan.html\n")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<h1>What trlpatch changes in TRL 0.18.2</h1>" in page
    assert "<td class=applied>applied</td><td><code>engine_reuse</code></td>" in page
    assert "<td class=off>off</td><td><code>logps</code></td>" in page
    assert "_trlpatch.engine(self, model, LLM)" in page
    removed = re.findall(r'<td class="code old">(.*?)</td>', page)
    assert removed
    assert {html.unescape(line) for line in removed} <= set(GRPO.splitlines())
    refused = trlpatch("plan", "grpo", "--trl-path", trl, "--html", "missing/plan.html")
    fails(refused, 2, "Cannot write missing/plan.html: No such file or directory. Name another file with --html.")


def test_a_page_names_what_does_not_fit(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    grpo = trl / "trl" / "trainer" / "grpo_trainer.py"
    grpo.write_text(grpo.read_text(encoding="utf-8").replace("self.llm = LLM(", "self.llm = make(LLM, "), "utf-8")
    assert trlpatch("plan", "grpo", "--trl-path", trl, "--html", "plan.html").returncode == 0
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<td class=failed>failed</td><td><code>engine_reuse</code></td>" in page
    assert "<p class=failed>" in page


def test_a_diff_is_paged_on_a_terminal(trl: Path, tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text(f'#!/bin/sh\necho "LESS=$LESS"\ncat > "{tmp_path}/paged"\n', encoding="utf-8")
    pager.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": f"{trl}{os.pathsep}{ROOT}", "TERM": "xterm", "PAGER": str(pager)}
    environment.pop("LESS", None)
    shown = in_terminal(["diff", "grpo"], environment, columns=80)
    assert "LESS=FRX" in shown
    assert "--- a/trl/trainer/grpo_trainer.py" in (tmp_path / "paged").read_text(encoding="utf-8")
