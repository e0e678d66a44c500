"""`trlpatch check`, and input that no command can use."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests.cli.small_trl import FILES, TARGETS, Run, fails, install
from trlpatch.preview import preview


def test_check_fits(trl: Path, trlpatch: Run) -> None:
    result = trlpatch("check", "--trl-path", trl)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"TRL 0.18.2 at {trl}"
    fits = lines.index("every patch fits")
    assert [line.split()[0] for line in lines[1:fits]] == TARGETS
    assert lines[fits + 1].startswith("versions ")


def test_check_looks_at_the_installed_trl(trl: Path, trlpatch: Run) -> None:
    assert f"TRL 0.18.2 at {trl / 'trl'}" in trlpatch("check").stdout


def test_check_reads_a_wheel(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    wheel = tmp_path / "trl-0.18.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"trl/{name}", text)
        metadata = "Metadata-Version: 2.1\nName: trl\nVersion: 0.18.2\nRequires-Dist: transformers>=4.50.0\n"
        archive.writestr("trl-0.18.2.dist-info/METADATA", metadata)
    result = trlpatch("check", "--trl-path", wheel)
    assert result.returncode == 0, result.stderr
    assert str(wheel) in result.stdout
    install(trl, transformers="4.49.0")
    result = trlpatch("check", "--trl-path", wheel)
    assert result.returncode == 3
    said = "trl 0.18.2 demands transformers>=4.50.0, and 4.49.0 is there. (metadata of trl)"
    assert said in " ".join(result.stdout.split())


def test_the_verdict_folds_at_80_columns_also_where_there_is_no_terminal(trl: Path, trlpatch: Run) -> None:
    install(trl, vllm="0.24.0", transformers="4.57.6")
    lines = trlpatch("check").stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("versions "))
    *sentences, suggestion = lines[start:]
    assert len(sentences) > 2
    assert max(len(line) for line in sentences if "https://" not in line) <= 80
    assert suggestion.strip().startswith("instead: pip install ")


@pytest.mark.parametrize(
    ("word", "target"),
    [("GRPO", "grpo"), ("GRPOTrainer", "grpo"), ("grpo_trainer", "grpo"), ("Online-DPO", "online_dpo"),
     ("GRPOConfig", "grpo_config"), ("online_dpo_config.py", "online_dpo_config")],
)  # fmt: skip
def test_targets_may_be_spelled_as_for_patchfastrl(trl: Path, word: str, target: str) -> None:
    assert [file.source.target.name for file in preview(trl, [word]).files] == [target]


def test_check_says_what_ran_where_nothing_is_installed_beside_trl(trl: Path, trlpatch: Run) -> None:
    done = trlpatch("check", "--trl-path", trl)
    assert done.returncode == 0
    assert "versions   incomplete: TRL 0.18.2, vLLM not installed, transformers not installed" in done.stdout
    assert 'pip install "trl==0.18.2" ' in done.stdout


def test_check_exits_3_on_versions_that_are_known_not_to_work(trl: Path, trlpatch: Run) -> None:
    install(trl, vllm="0.24.0", transformers="4.57.6")
    done = trlpatch("check")
    assert done.returncode == 3
    assert "every patch fits" in done.stdout
    assert "versions   known-bad: TRL 0.18.2, vLLM 0.24.0, transformers 4.57.6" in done.stdout
    assert "https://github.com/vllm-project/vllm/pull/45161" in done.stdout
    assert "instead: pip install " in done.stdout


def test_check_exits_1_where_patches_do_not_fit_whatever_the_versions(drifted: Path, trlpatch: Run) -> None:
    install(drifted, vllm="0.24.0", transformers="4.57.6")
    assert trlpatch("check").returncode == trlpatch("check", "--json").returncode == 1


def test_check_as_json_holds_the_verdict_on_versions(trl: Path, trlpatch: Run) -> None:
    install(trl, vllm="0.24.0", transformers="4.57.6")
    done = trlpatch("check", "--json")
    assert done.returncode == 3
    versions = json.loads(done.stdout)["versions"]
    assert versions["state"] == "known-bad"
    assert versions["versions"]["vllm"] == "0.24.0"
    assert versions["findings"][0]["source"].startswith("https://")
    assert versions["instead"].startswith("pip install ")


def test_check_exits_1_on_drift(drifted: Path, trlpatch: Run) -> None:
    result = trlpatch("check", "--trl-path", drifted)
    fails(result, 1, "live_adapter on grpo", "rollout_call: expected 1, found 2", "grpo_trainer.py:")
    assert "failed" in result.stdout
    assert "stays stock" in result.stdout
    assert "every patch fits" not in result.stdout


def test_check_as_json(drifted: Path, trlpatch: Run) -> None:
    result = trlpatch("check", "--json", "--trl-path", drifted)
    assert (result.returncode, result.stderr) == (1, "")
    found = json.loads(result.stdout)
    assert (found["trl"], found["fits"], found["held_back"]) == ("0.18.2", False, ["grpo_config"])
    grpo = next(file for file in found["files"] if file["target"] == "grpo")
    assert grpo["upstream_sha256"] == grpo["patched_sha256"]
    drift = next(patch["drift"] for patch in grpo["patches"] if patch["patch"] == "live_adapter")
    assert (drift["expected"], drift["found"]) == (1, 2)


def test_check_names_a_new_trainer_on_vllm_generation_beside_the_verdict(trl: Path, trlpatch: Run) -> None:
    new = trl / "trl" / "experimental" / "newpo_trainer.py"
    new.parent.mkdir()
    text = (
        "class NewPOTrainer:\n    def __init__(self, model):\n        self.vllm_generation = VLLMGeneration(model)\n"
    )
    new.write_text(text, encoding="utf-8")
    done = trlpatch("check", "--trl-path", trl)
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert "every patch fits; no target, rolls out through VLLMGeneration, which stays stock: trl/exp" in said
    assert "newpo_trainer.py: rolls out through VLLMGeneration; no patch knows this trainer" in said


def test_check_of_one_target_overlooks_the_others(drifted: Path, trlpatch: Run) -> None:
    assert trlpatch("check", "online_dpo", "--trl-path", drifted).returncode == 0


def test_check_names_a_file_that_is_not_there(trl: Path, trlpatch: Run) -> None:
    (trl / "trl" / "trainer" / "online_dpo_config.py").unlink()
    fails(
        trlpatch("check", "--trl-path", trl), 1, "online_dpo_config", "trl/trainer/online_dpo_config.py is not there"
    )


def test_check_names_a_file_that_is_not_python(trl: Path, trlpatch: Run) -> None:
    (trl / "trl" / "trainer" / "grpo_trainer.py").write_text("def broken(:\n", encoding="utf-8")
    fails(trlpatch("check", "--trl-path", trl), 1, "grpo_trainer.py:1 is not Python")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["check", "nope"], ["Unknown target 'nope'", "grpo, grpo_config"]),
        (["plan", "GPROTrainer"], ["Unknown target 'GPROTrainer'; did you mean 'grpo'?"]),
        (["plan", "sft"], ["Unknown target 'sft': TRL's trainer of that name", "needs no patch. Known:"]),
        (["diff", "gpro_config"], ["Unknown target 'gpro_config'; did you mean 'grpo_config'?"]),
        (["check", "rloo"], ["TRL 0.18.2 has no target 'rloo'", "It has: grpo"]),
        (["check", "--skip", "nope"], ["nope", "trlpatch list"]),
        (["check", "--skip", "slep"], ["skip=['slep'] names no patch; did you mean 'sleep'?"]),
        (["check", "--trl-path", "/does/not/exist"], ["No such file or directory: /does/not/exist"]),
        (["check", "--trl-path", __file__], ["neither a directory nor a wheel"]),
        (["frobnicate"], ["No such command 'frobnicate'"]),
        (["diff", "--frobnicate"], ["No such option"]),
        (["dump"], ["Missing option '--out'"]),
        (["demo", "--steps", "0"], ["0 is not in the range"]),
        (["run"], ["nothing to run"]),
        (["run", "absent.py"], ["trlpatch run absent.py: no such file"]),
        (["run", "--slep", "kv", "train.py"], ["has no option --slep (did you mean --sleep?)"]),
        (["run", "--old-logp=reuse", "train.py"], ["has no option --old-logp (did you mean --old-logps?)"]),
        (["run", "-c", "pass"], ["has no option -c", "trlpatch run python ..."]),
    ],
)
def test_bad_input_is_one_message_and_status_2(trl: Path, trlpatch: Run, words: list[str], texts: list[str]) -> None:
    fails(trlpatch(*words), 2, *texts)


def test_no_trl(trlpatch: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(trlpatch("check", "--trl-path", "empty"), 2, "No TRL at empty")


def test_old_trl(trl: Path, trlpatch: Run) -> None:
    (trl / "trl" / "__init__.py").write_text('__version__ = "0.17.0"\n', encoding="utf-8")
    fails(trlpatch("check", "--trl-path", trl), 2, "0.17.0", "0.18.0")
