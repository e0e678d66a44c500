"""benchmarks/bench_ranks.py: reports of ranks become figures and aims, a rank that fails ends the others. No run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import launch
from benchmarks.bench_ranks import each
from benchmarks.launch import rank_environment, wait_for
from benchmarks.ranks_summary import aims, summary, table
from benchmarks.ranks_ways import PARTS, Case, cases_of
from benchmarks.step_timers import sync_calls
from benchmarks.step_ways import Order

ORDER = Order(
    model="7b", tokens=256, completions=64, per_device=16, generations=8, rank=16, sleep=False, utilization=0.4,
    warmup=1, steps=3, parts=0, learning_rate=1e-3, cuda=True,
)  # fmt: skip


def syncs(*seconds: float, peak: float, before: float = 30.0) -> list[dict[str, Any]]:
    common = {"event": "sync", "time": 0.0, "before_gib": before, "peak_gib": peak}
    return [{**common, "seconds": one} for one in seconds]


def of(name: str, *ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return summary(Case.named(name, "graphs"), ORDER, list(ranks))


def test_the_first_hand_over_does_not_count_and_the_slower_rank_does() -> None:
    found = of(
        "fsdp2-trlpatch-2",
        syncs(9.0, 0.01, 0.03, peak=31.0),
        syncs(9.0, 0.02, 0.06, peak=32.0, before=31.5),
    )
    assert found["hand_over_ms"] == pytest.approx(40.0)
    assert (found["peak_gib"], found["rise_gib"]) == (32.0, 1.0)
    assert "hand_over_ms" not in of("fsdp2-trlpatch-2", syncs(9.0, 0.01, peak=31.0), []), (
        "a rank that reported nothing"
    )


def test_steps_and_generation_are_medians_of_the_first_rank() -> None:
    steps = [{"event": "step", "phase": phase, "seconds": one, "cpu_s": one / 2} for phase, one in
             (("warmup", 9.0), ("timed", 2.0), ("timed", 4.0), ("timed", 3.0))]  # fmt: skip
    found = of("ddp-trlpatch-2", steps, [])
    assert (found["step_s"], found["cpu_s"]) == (3.0, 1.5)
    calls = [
        {"event": "generation", "what": what, "seconds": one, "tokens": 100}
        for what in ("base", "adapter")
        for one in (1, 2, 3)
    ]
    alike = [{"event": "sampled", "what": "base", "tokens": [[1, 2]]}]
    found = of("tp-trlpatch-2", [*calls, *alike], alike)
    assert (found["base_s"], found["adapter_s"], found["sampled_alike"]) == (2, 2, True)
    assert found["engine_tokens_per_s"] == [50.0]
    assert not of("tp-trlpatch-2", alike, [])["sampled_alike"]


def test_what_takes_weights_to_an_engine_is_found_under_each_name_of_trl() -> None:
    def calls() -> None: ...

    newest = SimpleNamespace(vllm_generation=SimpleNamespace(sync_weights=calls, llm=None))
    older = SimpleNamespace(_move_model_to_vllm=calls)
    asynchronous = SimpleNamespace(vllm_generation=None, _sync_weight=calls)
    assert list(sync_calls(newest)) == [(newest.vllm_generation, "sync_weights")]
    assert list(sync_calls(older)) == [(older, "_move_model_to_vllm")]
    assert list(sync_calls(asynchronous)) == [(asynchronous, "_sync_weight")]
    assert list(sync_calls(SimpleNamespace())) == []


def test_aims_are_ratios_within_the_run_and_absent_without_their_cases() -> None:
    one, two = {"case": "ddp-trlpatch-1", "step_s": 2.0}, {"case": "ddp-trlpatch-2", "step_s": 2.1}
    (met,) = aims([one, two])
    assert (met["found"], met["met"]) == (1.05, True)
    (missed,) = aims([one, {**two, "step_s": 2.4}])
    assert (missed["found"], missed["met"]) == (1.2, False)
    assert aims([two]) == []
    (of_eight,) = aims([one, {"case": "ddp-trlpatch-8", "step_s": 2.28}])
    assert (of_eight["at_most"], of_eight["met"]) == (1.15, True)
    (alone,) = aims([{"case": "fsdp2-trlpatch-2", "hand_over_ms": 51.0}])
    assert not alone["met"]


def test_the_table_has_every_case_every_aim_and_every_error() -> None:
    results = [
        of("fsdp2-stock-2", []) | {"error": "rank 0: KeyError: 'x'"},
        of("fsdp2-trlpatch-2", *[syncs(1, 0.01, peak=31)] * 2),
    ]
    document = {
        "date": "2026-11-28", "ranks": 2, "shapes": {"ddp": "1.5b", "tp": "7b"},
        "settings": {"rank": 16, "completions": 64, "tokens": 256}, "results": results, "aims": aims(results),
    }  # fmt: skip
    said = table(document)
    assert "| fsdp2-trlpatch-2 |  |  |  | 10.0 |" in said
    assert "FSDP2, 2 ranks: hand-over in ms: 10.0 (at most 50.0): met" in said
    assert "fsdp2-stock-2: rank 0: KeyError: 'x'" in said


def test_what_comes_after_training_is_not_of_a_step_and_every_rank_counts() -> None:
    def rank(seconds: float, nats: float, held: float) -> list[dict[str, Any]]:
        return [
            {"event": "step", "phase": "warmup", "seconds": 9.0, "allocated_gib": 1.0},
            {"event": "rollout", "seconds": seconds, "tokens": 100},
            {"event": "step", "phase": "timed", "seconds": 2.0, "allocated_gib": held},
            {"event": "rollout", "seconds": 0.001, "tokens": 100},
            {"event": "policy_gap", "nats": nats, "control": 0.5 + nats},
            {"event": "memory", "peak_gib": 2.0},
        ]

    found = of("ddp-trlpatch-2", rank(2.0, 0.01, 3.0), rank(4.0, 0.02, 1.0))
    assert found["engine_tokens_per_s"] == [50.0, 25.0]
    assert (found["gap"], found["control"]) == (0.02, 0.51)
    assert found["memory_gib"] == [3.0, 2.0]
    assert of("grpotp-trlpatch-2", rank(2.0, 0, 3), rank(4.0, 0, 1))["engine_tokens_per_s"] == [50.0], "one engine"


def test_the_number_of_ranks_is_all_that_changes() -> None:
    assert cases_of(["ddp", "tp"], 2) == [
        "ddp-trlpatch-1", "ddp-stock-2", "ddp-trlpatch-2", "tp-trlpatch-1", "tp-trlpatch-2",
    ]  # fmt: skip
    assert cases_of(["fsdp2", "tp"], 8) == [
        "fsdp2-stock-8", "fsdp2-trlpatch-8", "tp-trlpatch-1", "tp-trlpatch-2", "tp-trlpatch-4",
    ]  # fmt: skip
    assert cases_of(["grpotp"], 2) == ["grpotp-stock-2", "grpotp-trlpatch-2"]
    for name in cases_of(PARTS, 4):
        assert Case.named(name, "eager").name == name
    with pytest.raises(ValueError, match="expected parts of ddp"):
        cases_of(["nonsense"], 2)
    with pytest.raises(ValueError, match="--ranks 1: expected 2 or more"):
        cases_of(["ddp"], 1)
    for wrong in ("ddp-trlpatch", "ddp-trlpatch-0", "ddp-ours-2", "ddp-trlpatch-2-2", "tp-stock-2", "fsdp2-stock-1"):
        with pytest.raises(ValueError, match=wrong):
            Case.named(wrong, "eager")


def test_cases_of_one_rank_have_a_card_each_and_come_first() -> None:
    cases = [Case.named(name, "") for name in cases_of(["ddp", "tp"], 4)]
    asked = list(each(cases, lambda case, devices: {"case": case.name, "on": devices}, cuda=True))
    assert [one["case"] for one in asked[:2]] == ["ddp-trlpatch-1", "tp-trlpatch-1"]
    assert {one["on"] for one in asked[:2]} <= {"0", "1", "2", "3"}
    assert [one["on"] for one in asked[2:]] == ["0,1,2,3", "0,1,2,3", "0,1", "0,1,2,3"]


def test_a_rank_alone_has_no_launcher_and_several_have_one(tmp_path: Path) -> None:
    alone = rank_environment(0, 1, "3", tmp_path)
    assert alone["CUDA_VISIBLE_DEVICES"] == "3"
    assert "WORLD_SIZE" not in alone
    third = rank_environment(2, 4, None, tmp_path)
    assert (third["RANK"], third["WORLD_SIZE"], third["DS_ACCELERATOR"]) == ("2", "4", "cpu")
    assert "CUDA_VISIBLE_DEVICES" not in third


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.0)
    waiting = child("import time; time.sleep(1000)")
    assert wait_for([child("raise SystemExit(3)"), waiting], timeout=1000.0) == [3, None]
    assert waiting.returncode == -signal.SIGKILL


def test_ranks_that_are_late_are_ended_and_ranks_that_are_done_are_not() -> None:
    late = child("import time; time.sleep(1000)")
    assert wait_for([late], timeout=0.0) == [None]
    assert late.returncode == -signal.SIGKILL
    assert wait_for([child(""), child("")], timeout=1000.0) == [0, 0]


TERMINATED = """
import sys
from benchmarks.launch import end_all_when_terminated, start, wait_for
end_all_when_terminated()
pipe = int(sys.argv[1])
rank = f"import os, time; os.write({pipe}, b'r'); time.sleep(1000)"
wait_for([start([sys.executable, "-c", rank], pass_fds=(pipe,))], timeout=1000.0)
"""


def test_a_benchmark_that_is_terminated_leaves_no_rank_behind() -> None:
    """As `timeout` ends it: the ranks, in sessions of their own, would keep their GPUs."""
    read, write = os.pipe()
    benchmark = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, str(write)], pass_fds=(write,), cwd=Path(__file__).parents[1]
    )
    try:
        os.close(write)
        assert os.read(read, 1) == b"r", "the rank runs"
        benchmark.terminate()
        assert benchmark.wait() == 128 + signal.SIGTERM
        assert os.read(read, 1) == b"", "whoever holds the other end of the pipe is gone"
    finally:
        os.close(read)
        benchmark.kill()
        benchmark.wait()


def test_what_a_thread_starts_once_the_benchmark_is_terminated_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started:
        pid = 7

    killed: list[int] = []
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=lambda *_, **__: Started()))
    monkeypatch.setattr(launch, "_kill", lambda child: killed.append(child.pid))
    monkeypatch.setattr(launch, "_running", set())
    monkeypatch.setattr(launch, "_terminated", threading.Event())
    launch.start(["case"])
    assert killed == []
    launch._terminated.set()
    launch.start(["case"])
    assert killed == [7]
