"""benchmarks/bench_step.py on a tiny model: it measures every way, reports what fails, and its figures move."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.step_timers import PARTS
from tests import processes

pytest.importorskip("vllm")

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
DELAY = 0.5
PLAIN, SLOW, WRONG = "trlpatch-attached", f"trlpatch-attached+slow.sync={DELAY}", "trlpatch+adapter=nonsense"
TOKENS = 8


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, int]:
    """The document, what was printed, and the exit status."""
    folder = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable, "benchmarks/bench_step.py", "--shape", "tiny", "--device", "cpu", "--tokens", str(TOKENS),
        "--completions", "8", "--generations", "4", "--warmup", "1", "--steps", "3", "--parts", "2",
        "--ways", f"{PLAIN},{SLOW}", "--options", "adapter=nonsense",
        "--models", str(folder / "models"), "--out", str(folder / "step.json"),
    ]  # fmt: skip
    done = processes.run(command, timeout=1200)
    assert (folder / "step.json").exists(), done.stderr[-2000:]
    return json.loads((folder / "step.json").read_text(encoding="utf-8")), done.stdout, done.returncode


@pytest.fixture(scope="module")
def results(ran: tuple[dict[str, Any], str, int]) -> dict[str, dict[str, Any]]:
    return {result["way"]: result for result in ran[0]["results"]}


def test_every_way_is_measured(results: dict[str, dict[str, Any]]) -> None:
    assert list(results) == [PLAIN, SLOW, WRONG]
    for way in (PLAIN, SLOW):
        result = results[way]
        assert "error" not in result
        assert [step["phase"] for step in result["steps"]] == ["warmup", *["timed"] * 3, *["parts"] * 2]
        assert result["completion_length_range"] == [TOKENS, TOKENS]
        assert result["logp_difference"] < 1e-4  # float32 on both sides
        assert set(result["load_s"]) == {"import", "model", "trainer"}
        assert {"trl", "vllm", "torch", "transformers"} <= set(result["versions"])


def test_the_parts_are_the_step(results: dict[str, dict[str, Any]]) -> None:
    for step in results[PLAIN]["steps"]:
        if step["phase"] == "parts":
            assert set(step["parts"]) == set(PARTS)
            assert min(step["parts"].values()) >= 0.0
            assert sum(step["parts"].values()) == pytest.approx(step["seconds"])
    assert all(results[PLAIN]["parts_s"][part] > 0.0 for part in PARTS if part != "sleep")


def test_a_slow_hand_over_is_seen(results: dict[str, dict[str, Any]]) -> None:
    plain, slow = results[PLAIN], results[SLOW]
    assert max(plain["sync_s"], DELAY) < slow["sync_s"]
    assert min(step["seconds"] for step in slow["steps"] if step["phase"] == "timed") > DELAY
    assert slow["ratios"]["sync_s"] == pytest.approx(slow["sync_s"] / plain["sync_s"], rel=1e-2)
    assert slow["ratios"]["step_s"] == pytest.approx(slow["step_s"] / plain["step_s"], rel=1e-2)
    assert set(plain["ratios"].values()) == {1.0}


def test_a_way_that_fails_is_reported_and_the_others_stay(ran: tuple[dict[str, Any], str, int]) -> None:
    document, printed, status = ran
    assert status == 1
    assert "InvalidOption: PatchFastRL(adapter='nonsense')" in document["results"][-1]["error"]
    assert f"{WRONG}: " in printed
    assert f"| {SLOW} | " in printed


def test_the_report_holds_the_table(ran: tuple[dict[str, Any], str, int], tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    for _ in range(2):  # the second one replaces the first
        report.add(tmp_path / "performance.json", [ran[0]])
        report.render(tmp_path, pictures=False)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old\n" not in text
    assert text.count("### tiny") == 1
    assert text.count(f"| {PLAIN} | ") == 1
