"""`trlpatch scale`: a table of rollout GPUs, one number of them, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from trlpatch.cli import cli
from trlpatch.errors import CalibrationError, InvalidSetting
from trlpatch.scale.calibration import PACKAGED


def run(*words: Any) -> Result:
    return CliRunner().invoke(cli, ["scale", *map(str, words)])


def test_it_says_how_many_rollout_gpus_a_run_wants() -> None:
    words = ("--trainer-gpus", 8, "--completions", 512, "--median", 400, "--tokens", 4096)
    shown = run(*words)
    assert shown.exit_code == 0, shown.output
    found = json.loads(run(*words, "--json").output)
    assert [row["rollout_gpus"] for row in found["rows"]] == [2**power for power in range(10)]
    assert f"wants {found['wants']} rollout GPUs" in shown.output
    assert f"then it waits for {found['bound']}" in shown.output
    assert found["wants"] <= found["best"]
    best = min(row["step_s"] for row in found["rows"])
    assert next(row for row in found["rows"] if row["rollout_gpus"] >= found["wants"])["step_s"] <= best / 0.9


def test_one_number_of_gpus_is_predicted_and_simulated() -> None:
    found = json.loads(run("--rollout-gpus", 2, "--mode", "sync", "--tokens", 256, "--json").output)
    assert found["setting"]["engines"] == 2
    assert found["closed_form"]["step_s"] == pytest.approx(found["simulated"]["step_s"])
    shown = run("--rollout-gpus", 2, "--mode", "sync", "--tokens", 256).output
    assert f"{found['simulated']['step_s']:.2f} s" in shown


def test_gpus_are_divided_between_trainer_and_engines() -> None:
    setting = json.loads(run("--gpus", 16, "--completions", 256, "--json").output)["setting"]
    assert setting["trainer_gpus"] + setting["rollout_gpus"] == setting["gpus"] == 16


def test_lengths_that_were_seen_are_drawn_from(tmp_path: Path) -> None:
    seen = tmp_path / "lengths.txt"
    seen.write_text("100 200\n300\n", encoding="utf-8")
    assert "completions of 200 tokens in the mean" in run("--lengths", seen, "--rollout-gpus", 1).output
    seen.write_text("a b", encoding="utf-8")
    refused = run("--lengths", seen)
    assert refused.exit_code == 2
    assert "expected whole numbers" in refused.output


def test_what_cannot_be_is_refused_with_what_can(tmp_path: Path) -> None:
    assert run("--rollout-gpus", 1, "--gpus", 2).exit_code == 2
    for words, text in (
        (("--shape", "8b"), "shape: expected one of 1.5b, 7b, 32b, 72b"),
        (("--completions", 12), "completions: expected a multiple of generations"),
        (("--rollout-gpus", 3, "--tensor-parallel", 2), "rollout_gpus: expected a multiple of tensor_parallel"),
        (("--gpus", 1), "gpus: expected 2 or more"),
        (("--rank", 0, "--sync", "adapter"), "rank 0 has no adapter"),
    ):
        error = run(*words).exception
        assert isinstance(error, InvalidSetting)
        assert text in str(error)
    other = tmp_path / "calibration.json"
    document = json.loads(PACKAGED.read_text(encoding="utf-8"))
    for change in ({"request_s": None}, {"request_s": {**document["inputs"]["request_s"], "basis": "guessed"}}):
        inputs = {name: entry for name, entry in (document["inputs"] | change).items() if entry}
        other.write_text(json.dumps({**document, "inputs": inputs}), encoding="utf-8")
        error = run("--calibration", other).exception
        assert isinstance(error, CalibrationError)
        assert "request_s" in str(error)
    assert isinstance(run("--calibration", tmp_path / "none").exception, CalibrationError)
