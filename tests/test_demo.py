"""The demo's parts that need no torch, and a short demo where torch and an engine are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trlpatch.demo import show, tiny, train
from trlpatch.demo.show import milestones, sparkline
from trlpatch.errors import DemoNeedsPackages, InvalidOption
from trlpatch.runtime.report import PatchReport
from trlpatch.source.locate import find_trl

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("123", 1.0), ("1 2\t3\n", 1.0), ("ab 12", 0.5), ("stone", 0.0), ("", 0.0), ("   ", 0.0)],
)
def test_reward_is_the_share_of_digits(completion: str, reward: float) -> None:
    assert train.digits([completion], prompts=["ignored"]) == [reward]


def test_sparkline_spans_the_blocks() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([-1.0, 2.0]) == "▁█"
    assert sparkline([]) == ""


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30, 1000])
def test_milestones_hold_first_and_last(count: int) -> None:
    steps = milestones(count)
    assert (steps[0], steps[-1]) == (1, count)
    assert len(steps) == min(count, 8)
    assert steps == sorted(set(steps))


def test_what_is_shown_is_plain_lines_where_stdout_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PatchReport, "engines", ())  # those of other tests may be alive in this process
    report = PatchReport(trl="1.16.0", files={"grpo": f"/{'cache' * 30}/grpo_trainer.py"})
    setting = train.Setting(report, "transformers, because [vLLM] is not installed", {"trl": "1.16.0"}, 12345)

    def at_once(
        steps: int, seed: int, on_start: Callable[[train.Setting], None], on_step: object, out: Path | None
    ) -> train.Result:
        on_start(setting)
        return train.Result(setting, (0.25, 0.5, 1.0), 12.3)

    monkeypatch.setattr(show, "train", at_once)
    show.play(3, 0, Path("kept"), quiet=False)
    shown = capsys.readouterr().out
    assert "\nExport it:\n  trlpatch export merged kept/adapter --out kept/merged\n" in shown
    assert "  rollouts   transformers, because [vLLM] is not installed\n" in shown
    assert f"\n{report}\n" in shown
    assert (
        "\nreward per step  ▃▅█\nstep    1     2     3\nreward  0.25  0.50  1.00\n0.25 -> 1.00 in 3 steps, 12 s\n"
        in shown
    )
    assert f"\n  grpo  {report.files['grpo']}\n" in shown
    show.play(3, 0, quiet=True)
    assert capsys.readouterr().out == ""


def test_corpus_depends_on_the_seed_only() -> None:
    assert tiny.corpus(5, seed=1) == tiny.corpus(5, seed=1) != tiny.corpus(5, seed=2)


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(DemoNeedsPackages, match=r"no_such_package, which is not installed\. Run: pip install"):
        train.train(1, 0, lambda setting: None, lambda step, reward: None)


@pytest.mark.cpu
@pytest.mark.release
def test_demo_learns_on_an_attached_engine(tmp_path: Path) -> None:
    if (0, 18, 0) < find_trl().release < (1, 14, 2):
        pytest.skip("the extra demo installs 1.14.2 or newer: of those that it does not, the oldest is enough")
    environment = {**os.environ, "TRLPATCH_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "trlpatch", "demo", "--steps", "20", "--json", "--out", str(tmp_path / "kept")],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rollouts"].startswith("vLLM engine in this process")
    assert len(result["rewards"]) == 20
    first, last = sum(result["rewards"][:5]) / 5, sum(result["rewards"][-5:]) / 5
    assert last > first + 0.2, result["rewards"]
    assert all(str(tmp_path) in file for file in result["report"]["files"].values())
    assert f"step 20 of 20, reward {result['rewards'][-1]:.2f}" in done.stderr, "a log has no bar"
    adapter = json.loads((tmp_path / "kept" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert Path(adapter["base_model_name_or_path"]) == tmp_path / "kept" / "model"


def test_what_lies_in_the_directory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "NEEDED", ())
    (tmp_path / "mine").touch()
    with pytest.raises(InvalidOption, match="expected an empty or new directory, found files"):
        train.train(1, 0, lambda setting: None, lambda step, reward: None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
