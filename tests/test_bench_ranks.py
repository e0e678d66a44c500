"""benchmarks/bench_ranks.py: reports of ranks become figures and aims, a rank that fails ends the others. No run."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import bench_ranks
from benchmarks.bench_ranks import cases_of, each, wait_for
from benchmarks.ranks_summary import aims, summary, table
from benchmarks.ranks_ways import RANKS, Case
from benchmarks.step_ways import Order

ORDER = Order(
    model="7b", tokens=256, completions=64, per_device=16, generations=8, rank=16, sleep=False, utilization=0.4,
    warmup=1, steps=3, parts=0, learning_rate=1e-3, cuda=True,
)  # fmt: skip


def syncs(*seconds: float, peak: float, before: float = 30.0) -> list[dict[str, Any]]:
    common = {"event": "sync", "time": 0.0, "before_gib": before, "peak_gib": peak}
    return [{**common, "seconds": one} for one in seconds]


def of(name: str, *ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return summary(Case(name, "graphs"), ORDER, list(ranks))


def test_the_first_hand_over_does_not_count_and_the_slower_rank_does() -> None:
    found = of(
        "fsdp2-trlpatch",
        syncs(9.0, 0.01, 0.03, peak=31.0),
        syncs(9.0, 0.02, 0.06, peak=32.0, before=31.5),
    )
    assert found["hand_over_ms"] == pytest.approx(40.0)
    assert (found["peak_gib"], found["rise_gib"]) == (32.0, 1.0)
    assert "hand_over_ms" not in of("fsdp2-trlpatch", syncs(9.0, 0.01, peak=31.0), []), "a rank that reported nothing"


def test_steps_and_generation_are_medians_of_the_first_rank() -> None:
    steps = [{"event": "step", "phase": phase, "seconds": one} for phase, one in
             (("warmup", 9.0), ("timed", 2.0), ("timed", 4.0), ("timed", 3.0))]  # fmt: skip
    assert of("ddp-2", steps, [])["step_s"] == 3.0
    calls = [
        {"event": "generation", "what": what, "seconds": one} for what in ("base", "adapter") for one in (1, 2, 3)
    ]
    alike = [{"event": "sampled", "what": "base", "tokens": [[1, 2]]}]
    found = of("tp-2", [*calls, *alike], alike)
    assert (found["base_s"], found["adapter_s"], found["sampled_alike"]) == (2, 2, True)
    assert not of("tp-2", alike, [])["sampled_alike"]


def test_aims_are_ratios_within_the_run_and_absent_without_their_cases() -> None:
    one, two = {"case": "ddp-1", "step_s": 2.0}, {"case": "ddp-2", "step_s": 2.1}
    (met,) = aims([one, two])
    assert (met["found"], met["met"]) == (1.05, True)
    (missed,) = aims([one, {**two, "step_s": 2.4}])
    assert (missed["found"], missed["met"]) == (1.2, False)
    assert aims([two]) == []
    (alone,) = aims([{"case": "fsdp2-trlpatch", "hand_over_ms": 51.0}])
    assert not alone["met"]


def test_the_table_has_every_case_every_aim_and_every_error() -> None:
    results = [
        of("fsdp2-stock", []) | {"error": "rank 0: KeyError: 'x'"},
        of("fsdp2-trlpatch", *[syncs(1, 0.01, peak=31)] * 2),
    ]
    document = {
        "date": "2026-11-28", "shapes": {"ddp": "1.5b", "tp": "7b"},
        "settings": {"rank": 16, "completions": 64, "tokens": 256}, "results": results, "aims": aims(results),
    }  # fmt: skip
    said = table(document)
    assert "| fsdp2-trlpatch |  | 10.0 |" in said
    assert "FSDP2: hand-over in ms: 10.0 (at most 50.0): met" in said
    assert "fsdp2-stock: rank 0: KeyError: 'x'" in said


def test_cases_of_one_rank_have_a_card_each_and_come_first() -> None:
    names = cases_of(["ddp", "tp"])
    assert names == ["ddp-1", "ddp-2", "tp-1", "tp-2"]
    assert cases_of(["nonsense"]) == ["nonsense"]
    asked = list(each(names, lambda name, devices: {"case": name, "on": devices}, cuda=True))
    assert [one["case"] for one in asked] == ["ddp-1", "tp-1", "ddp-2", "tp-2"]
    assert {one["on"] for one in asked[:2]} <= {"0", "1"}
    assert [one["on"] for one in asked[2:]] == ["0,1", "0,1"]
    assert {RANKS[name] for name in names} == {1, 2}


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ranks, "GRACE", 0.0)
    waiting = child("import time; time.sleep(1000)")
    assert wait_for([child("raise SystemExit(3)"), waiting], timeout=1000.0) == [3, None]
    assert waiting.returncode == -signal.SIGKILL


def test_ranks_that_are_late_are_ended_and_ranks_that_are_done_are_not() -> None:
    late = child("import time; time.sleep(1000)")
    assert wait_for([late], timeout=0.0) == [None]
    assert late.returncode == -signal.SIGKILL
    assert wait_for([child(""), child("")], timeout=1000.0) == [0, 0]
