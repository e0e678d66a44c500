"""benchmarks/bench_ray.py and docs/scaling.md: what a run becomes in table and calibration. No run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import scaling_report
from benchmarks.bench_ray import fits, ways_of
from benchmarks.ray_summary import aims, calibrate, check_name, setting_of, summary, table
from benchmarks.ray_ways import RAY_WAYS, Beside, parse
from benchmarks.step_ways import Order
from trlpatch.scale.calibration import PACKAGED

ORDER: dict[str, Any] = {
    "model": "7b", "tokens": 256, "completions": 64, "per_device": 16, "generations": 8, "rank": 16, "sleep": False,
    "utilization": 0.45, "warmup": 1, "steps": 3, "parts": 0, "learning_rate": 1e-3, "cuda": True,
}  # fmt: skip


def events(*seconds: float) -> list[dict[str, Any]]:
    common = {"event": "step", "time": 0.0, "to_engines_s": 0.02, "sync_s": 0.03, "cpu_s": 0.5}
    steps = [
        {**common, "number": number, "phase": "warmup" if number == 1 else "timed", "seconds": value}
        for number, value in enumerate(seconds, 1)
    ]
    logs = [{"event": "log", "time": 0.0, "number": 2, "ray/queue_depth": 4.0}]
    return [
        {"event": "loaded", "seconds": {"all": 80.0}},
        *steps,
        *logs,
        {"event": "done", "device": "NVIDIA H200", "versions": {"trl": "1.16.0"}},
    ]


def document(**ways: list[dict[str, Any]]) -> dict[str, Any]:
    order = Order(**ORDER)
    named = {way.replace("_", "-"): found for way, found in ways.items()}
    return {
        "date": "2026-11-28", "command": "python benchmarks/bench_ray.py --shape 7b", "gpus": 2, "shape": "7b",
        "staleness": 4, "settings": ORDER, "results": [summary(way, order, [found]) for way, found in named.items()],
    }  # fmt: skip


def test_warm_up_does_not_count_and_rates_are_of_all_timed_steps() -> None:
    found = summary("ray", Order(**ORDER), [events(90.0, 2.0, 4.0, 6.0)])
    assert found["step_s"] == 4.0
    assert found["step_range_s"] == [2.0, 6.0]
    assert found["steps_per_s"] == 0.25
    assert found["tokens_per_s"] == 0.25 * 64 * 256
    assert found["to_engines_s"] == 0.02
    assert found["logged"] == {"ray/queue_depth": 4.0}
    assert len(found["steps"]) == 4


def test_ratios_are_to_the_first_way_and_predictions_beside() -> None:
    failed = {**summary("server", Order(**ORDER), [[]]), "error": "no end after 500 s"}
    given = document(colocated=events(9, 4, 4, 4), ray_async=events(9, 2, 2, 2))
    given["results"].append(failed)
    text = table(given)
    assert "| ray-async | 0.500 (2.00x) | 2.000 [2.00, 2.00] | 0.500 |" in text
    assert "server: no end after 500 s" in text
    predicted = float(text.split("| ray-async |")[1].split("|")[3])
    assert 1.0 < predicted < 4.0


def test_a_run_goes_into_the_calibration_and_says_so() -> None:
    before = json.loads(PACKAGED.read_text(encoding="utf-8"))
    probe = [
        {"event": "input", "name": "remote_call_s", "value": 0.001},
        {"event": "point", "sequences": 64, "tokens": 256, "prompt": 16, "seconds": 1.5},
        {"event": "point", "sequences": 256, "tokens": 256, "prompt": 16, "seconds": 3.0},
        {"event": "done", "device": "NVIDIA H100", "versions": {}},
    ]
    run = document(probe=probe, ray_async=events(9, 2, 3, 4))
    after = calibrate(before, [run])
    assert after["inputs"]["remote_call_s"]["basis"] == "measured"
    assert "bench_ray.py" in after["inputs"]["remote_call_s"]["source"]
    assert after["inputs"]["request_s"] == before["inputs"]["request_s"]
    assert (after["device"], len(after["generation_points"])) == ("NVIDIA H100", 2)
    of_four = summary("probe", Order(**ORDER), [[*probe[:1], {**probe[1], "engines": 4}]])
    again = calibrate(after, [{**run, "results": [of_four]}])
    assert again["generation_points"] == after["generation_points"], "the curve is one engine's"
    (check,) = [one for one in after["checks"] if one["name"] == "ray-async, 7b, 64 x 256, 2 GPUs"]
    assert check["measured"] == [2.0, 4.0]
    assert [one["name"] for one in after["checks"]] == [one["name"] for one in before["checks"]], (
        "filled in, not added"
    )
    assert calibrate(after, [run]) == after


def test_the_calibration_waits_for_the_ways_of_a_run_with_these_settings() -> None:
    empty = document(**{way.replace("-", "_"): [] for way in RAY_WAYS})
    waiting = {check["name"]: check["setting"] for check in json.loads(PACKAGED.read_text("utf-8"))["checks"]}
    for way in RAY_WAYS:
        if (setting := setting_of(empty, way)) is not None:
            assert waiting[f"{way}, 7b, 64 x 256, 2 GPUs"] == setting
    for gpus, trainers in ((4, 1), (4, 2), (8, 4)):
        several = {**empty, "gpus": gpus, "trainers": trainers}
        for way in ("ray", "ray-async", "server"):
            assert waiting[check_name(several, way)] == setting_of(several, way)


def test_a_run_on_a_cpu_calibrates_nothing() -> None:
    run = document(ray=events(9, 1, 1, 1))
    run["settings"] = {**ORDER, "cuda": False}
    with pytest.raises(ValueError, match="ran on a CPU"):
        calibrate(json.loads(PACKAGED.read_text(encoding="utf-8")), [run])


def test_several_trainers_are_one_run_with_the_engines_of_all() -> None:
    def rank(tokens: list[int], nats: float) -> list[dict[str, Any]]:
        found = events(9, 2, 2)
        for event in found:
            if event["event"] == "step":
                event["engine_tokens"] = tokens
        ends = {"event": "memory", "peak_gib": 30.0, "engines_gib": [90.0] * len(tokens)}
        return [*found, ends, {"event": "policy_gap", "nats": nats, "control": 0.5}]

    found = summary("ray", Order(**ORDER), [rank([100, 200], 0.01), rank([300, 400], 0.02)])
    assert found["engine_tokens_per_s"] == [50.0, 100.0, 150.0, 200.0]
    assert found["tokens_per_s"] == 0.5 * 2 * 64 * 256
    assert (found["trainer_gib"], found["engine_gib"]) == ([30.0, 30.0], [90.0] * 4)
    assert (found["gap"], found["control"]) == (0.02, 0.5)
    run = {**document(), "gpus": 8, "trainers": 4, "results": [found]}
    setting = setting_of(run, "ray")
    assert setting is not None
    assert (setting["trainer_gpus"], setting["rollout_gpus"], setting["completions"]) == (4, 4, 256)
    assert check_name(run, "ray") == "ray, 7b, 256 x 256, 4 + 4 GPUs"
    assert "| 50 to 200 |" in table(run)


def test_several_engines_are_compared_with_one_and_the_model_with_what_ran() -> None:
    def probed(seconds: float, engines: int) -> list[dict[str, Any]]:
        point = {"event": "point", "sequences": 64, "tokens": 256, "prompt": 16}
        return [
            {"event": "input", "name": "remote_call_s", "value": 0.001},
            {**point, "seconds": seconds, "engines": engines},
        ]

    run = document(probe=probed(1.5, 1), ray=events(9, 4.7, 4.7))
    run["results"].append(summary("probe", Order(**ORDER), [probed(1.6, 4)]))
    (engines, model) = aims(run)
    assert (engines["found"], engines["aim"], engines["met"]) == (3.75, "at least 3.5", True)
    assert "ray: predicted step" in model["what"]
    assert "| probe | 4 | 256 x 256 | 1.600 | 40,960 | 10,240 |" in table(run)


def test_gpus_are_divided_among_trainers_or_are_refused() -> None:
    def engines(gpus: int, trainers: int, spec: str = "ray", *, every_rank: bool = True) -> int:
        return Beside(gpus, 4, False, "eager", trainers).engines(parse(spec, cuda=True), every_rank=every_rank)

    assert (engines(4, 1), engines(4, 2), engines(8, 4), engines(8, 4, every_rank=False)) == (3, 1, 1, 4)
    assert engines(5, 1, "ray+engine.tensor_parallel_size=2") == 2
    assert engines(8, 1, "probe+engine.num_engines=1") == 1
    for gpus, trainers in ((1, 1), (2, 2), (5, 2)):
        with pytest.raises(ValueError, match="expected a multiple"):
            engines(gpus, trainers)
    with pytest.raises(ValueError, match="expected --trainers 1, found 2"):
        fits("ray-prefetch", Beside(4, 4, False, "eager", 2), cuda=True)
    assert "server" not in ways_of(1, cuda=False)
    assert ways_of(4, cuda=True) == ["colocated", "stock", "ray", "ray-async", "server"]


def test_ways_are_read_with_their_options() -> None:
    way = parse("ray+engine.enforce_eager=True+config.beta=0.1", cuda=True)
    assert (way.engine, way.config) == ({"enforce_eager": True}, {"beta": 0.1})
    with pytest.raises(ValueError, match="expected one of colocated"):
        parse("elsewhere", cuda=True)
    with pytest.raises(ValueError, match="needs GPUs"):
        parse("server", cuda=False)


def test_the_page_has_the_tables_of_this_model() -> None:
    """`python benchmarks/scaling_report.py` writes them."""
    page = (scaling_report.DOCS / "scaling.md").read_text(encoding="utf-8")
    for name in ("inputs", "checks", "wanted"):
        assert scaling_report.TABLES[name]() in page, name
    for picture in scaling_report.PICTURES:
        assert f"({picture})" in page
        assert (scaling_report.DOCS / picture).is_file()


def test_a_page_without_markers_is_not_written() -> None:
    with pytest.raises(ValueError, match="put them back"):
        scaling_report.filled("# Scaling\n")
