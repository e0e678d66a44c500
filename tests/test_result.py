"""benchmarks/result_arithmetic.py and faithfulness.py: the problems, the fit, the tables. No run."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest

from benchmarks import faithfulness, result_arithmetic
from benchmarks.arithmetic import Problem, Problems, correct
from benchmarks.faithfulness import fit
from benchmarks.result_arithmetic import WARMUP, summary

PROBLEMS = Problems(digits=2, held_out=100, seed=0)


def test_what_is_held_out_is_never_trained_on() -> None:
    held_out = PROBLEMS.evaluated()
    assert len(set(held_out)) == 100
    assert held_out == PROBLEMS.evaluated()
    drawn = {purpose: list(islice(PROBLEMS.stream(purpose), 20_000)) for purpose in ("supervised", "grpo")}
    assert drawn["supervised"] != drawn["grpo"]
    for problems in drawn.values():
        assert len(set(problems)) > 7_000  # of 8,000
        assert not set(problems) & set(held_out)
    assert Problems(2, 100, seed=1).evaluated() != held_out


def test_a_problem_and_its_reward() -> None:
    one = Problem(58, 67)
    assert (one.prompt, one.answer) == ("58+67=", "125")
    assert correct(["125", "12", "1255", ""], ["125"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_a_way_that_fails_keeps_what_it_measured() -> None:
    events: list[dict[str, Any]] = [
        {"event": "loaded", "time": 107.0, "versions": {"trl": "1"}, "device": "CPU", "status": ""},
        {"event": "accuracy", "number": 0, "share": 0.25},
    ]
    for number in range(1, WARMUP + 4):
        events.append({"event": "step", "number": number, "seconds": 9.0 if number <= WARMUP else 1.0})
        events.append({"event": "log", "number": number, "reward": 0.1 * number})
    result = summary("stock", events, 100.0)
    assert result["step_s"] == 1.0
    assert result["load_s"] == 7.0
    assert result["steps"][1] == {"number": 2, "seconds": 9.0, "reward": 0.2}
    assert summary("stock", [], 100.0) == {"way": "stock", "steps": [], "accuracy": []}
    document = {
        "supervised": {"parameters": 10**6, "seconds": 5.0, "curve": [[25, 0.0], [50, 0.3]]},
        "settings": {"digits": 2, "held_out": 9, "prompts": 4, "generations": 2, "rank": 8, "learning_rate": 1e-3,
                     "seed": 0},
        "results": [{**result, "error": "killed"}, summary("trlpatch", [], 0.0)],
    }  # fmt: skip
    written = result_arithmetic.table(document)
    assert "| stock | CPU | 0.250 | 0.250 | 6 | 0.300 | 0.400 | 1.000 | 7 |" in written
    assert "- stock FAILED: killed" in written


def changes(share: float, noise: float) -> tuple[list[float], list[float]]:
    numbers = random.Random(0)
    reference = [numbers.gauss(0, 1e-3) for _ in range(4000)]
    return reference, [share * x + numbers.gauss(0, noise) for x in reference]


@pytest.mark.parametrize(("share", "noise", "r2"), [(1.0, 1e-3, 0.5), (0.2, 1e-3, 0.04 / 1.04), (1.0, 0.0, 1.0)])
def test_the_fit_finds_what_arrived(share: float, noise: float, r2: float) -> None:
    found = fit(*changes(share, noise))
    assert found["slope"] == pytest.approx(share, abs=0.06)
    assert found["slope_error"] == pytest.approx(noise / 1e-3 / 4000**0.5, rel=0.1, abs=1e-9)
    assert found["r2"] == pytest.approx(r2, abs=0.03)
    assert found["missed"] == pytest.approx(((1 - share) ** 2 + (noise / 1e-3) ** 2) ** 0.5, rel=0.1, abs=1e-9)


def test_a_way_that_changes_nothing_misses_all() -> None:
    reference, _ = changes(1.0, 0.0)
    found = fit(reference, [0.0] * len(reference))
    assert (found["slope"], found["r2"], found["missed"]) == (0.0, 0.0, pytest.approx(1.0))
    settings = {"model": "tiny", "rank": 8, "steps": 1, "sequences": 1, "tokens": 2, "learning_rates": [1e-6]}
    document: dict[str, Any] = {
        "settings": settings, "ways": {"merge": [found]}, "updates": [{"unmoved": 0.875}],
        "errors": {"vllm": "killed"}, "seconds": {"merge": 3.0},
    }  # fmt: skip
    written = faithfulness.table(document)
    assert "| 1e-06 | merge | 0.000 ± 0.000 | 0.000 | 100.0% | 0.00e+00 | 87.5% of the adapted weights" in written
    assert "- vllm FAILED: killed" in written
