"""benchmarks/long_run.py: what it calls a leak and what noise, and when a rollout is another one. No run."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import long_run
from benchmarks.long_run import failed, same, table
from benchmarks.long_samples import trends
from benchmarks.long_training import Order, Progress, _callback
from benchmarks.step_timers import Lines

STEPS = 300
ROLLOUT: dict[str, Any] = {"adapter": True, "tokens": [[[1, 2], [3, 4]], [[5], [6, 7]]]}


def document(steps: int = STEPS, *, cuda: bool = False, **series: Any) -> dict[str, Any]:
    noise = random.Random(0)
    samples = [
        {
            "trained": float(at),
            "step": at,
            "rss": 1800 + noise.gauss(0, 2),
            "files": 56.0,
            "cpu": noise.gauss(0.3, 0.02),
        }
        | {name: float(value(at)) for name, value in series.items()}
        for at in range(1, steps + 1)
    ]
    return {"samples": samples, "settings": {"cuda": cuda}, "disturbed": [], "rollouts": []}


@pytest.mark.parametrize("steps", [30, 60, STEPS])
def test_noise_is_flat(steps: int) -> None:
    assert not failed(document(steps))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", lambda at: 56 + (at > 180)),  # one descriptor, lost in the one failure
        ("files", lambda at: 56 + at // 50),  # one a checkpoint
        ("rss", lambda at: 1800 + 0.1 * at),
        ("cpu", lambda at: 0.2 + 0.001 * at),
    ],
)
def test_a_leak_grows(key: str, value: Any) -> None:
    found = document(**{key: value})
    assert failed(found)
    assert [name for name, trend in trends(found["samples"], cuda=False).items() if trend.verdict == "GROWS"] == [key]
    assert table(found).count("GROWS") == 1


def test_what_only_the_first_third_takes_is_no_leak() -> None:
    assert not failed(document(rss=lambda at: 1800 + min(at, 100), files=lambda at: 40 + (at > 50)))


def test_a_process_that_failed_fails() -> None:
    assert failed({**document(), "error": "killed"})
    assert failed({**document(), "samples": []})


@pytest.mark.parametrize("other", [
    {**ROLLOUT, "adapter": False},
    {**ROLLOUT, "tokens": [[[1, 2], [3, 4]], [[5], [6, 8]]]},
    {**ROLLOUT, "tokens": [[[1, 2], [3, 4]], [[9], [6, 7]]]},
    {**ROLLOUT, "tokens": [[[1, 2], [3, 4]]]},
])  # fmt: skip
def test_another_rollout_fails(other: dict[str, Any]) -> None:
    assert not failed({**document(), "rollouts": [{"after": 1, "of": "it", **same(ROLLOUT, ROLLOUT)}]})
    assert failed({**document(), "rollouts": [{"after": 1, "of": "it", **same(ROLLOUT, other)}]})


ORDER = Order(
    model="m", out="none", steps=6, eval_every=9, save_every=9, interrupt=9, fail=9, tokens=1, completions=1,
    generations=1, rank=1, seconds=1e9, cuda=False, eager=True,
)  # fmt: skip


def test_steps_are_counted_over_all_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(TrainerCallback=object))
    marks: list[int] = []
    sampler: Any = SimpleNamespace(sample=lambda at: {"rss": at}, mark=lambda: marks.append(1))
    lines, progress = Lines(tmp_path / "lines"), Progress(sampler)
    for resumed_at in (0, 1):
        watch = _callback(ORDER, lines, progress)
        for step in (1, 2):
            watch.on_step_begin()
            watch.on_step_end(None, SimpleNamespace(global_step=resumed_at + step), SimpleNamespace())
    samples = [event["sample"] for event in Lines.read(tmp_path / "lines")]
    assert [(sample["trained"], sample["step"]) for sample in samples] == [(1, 1), (2, 2), (3, 2), (4, 3)]
    assert len(marks) == 1


def test_a_run_that_trained_on_from_no_checkpoint_keeps_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"event": "step", "sample": {"trained": 1, "step": 1, "rss": 1.0}}
    monkeypatch.setattr(long_run, "child", lambda *_: ([step], None))
    monkeypatch.setattr(long_run, "random_model", lambda *_, **__: tmp_path)
    monkeypatch.setattr(sys, "argv", ["long_run.py", "run", "--device", "cpu", "--out", str(tmp_path / "long.json")])
    assert long_run.main() == 1
    written = json.loads((tmp_path / "long.json").read_text(encoding="utf-8"))
    assert written["samples"] == [step["sample"]]
    assert "none was trained on from" in written["error"]
