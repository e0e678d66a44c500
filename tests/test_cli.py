"""The command line, run as a process of its own on a small TRL 0.18.2 in which every patch fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from trlpatch.cli import cli

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]

CONFIG = """
from dataclasses import dataclass, field


@dataclass
class {name}:
    use_vllm: bool = field(default=False)
    vllm_mode: str = field(default="server")
    vllm_server_host: str = field(default="0.0.0.0")
    vllm_server_port: int = field(default=8000)
    vllm_server_base_url: str | None = field(default=None)
    vllm_tensor_parallel_size: int = field(default=1)
    beta: float = field(default=0.1)

    def __post_init__(self):
        pass
"""

GRPO = """
def is_vllm_available():
    return False


if is_vllm_available():
    from vllm.sampling_params import GuidedDecodingParams


class GRPOTrainer:
    def __init__(self, model, args=None):
        self.use_vllm, self.vllm_mode = args.use_vllm, args.vllm_mode
        model_init_kwargs = {}
        model_init_kwargs["use_cache"] = model_init_kwargs.get("use_cache")
        model.warnings_issued["estimate_tokens"] = True
        self.llm = LLM(model=model.name_or_path)

    def _move_model_to_vllm(self):
        llm_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        llm_model.load_weights(self.model)

    def _generate_and_score_completions(self, prompts):
        sampling_params = SamplingParams(n=1, guided_decoding=None)
        outputs = self.llm.generate(prompts, sampling_params=sampling_params)
        return outputs
"""

ONLINE_DPO = """
class OnlineDPOTrainer:
    def __init__(self, model, args=None):
        model.warnings_issued["estimate_tokens"] = True
        if args.use_vllm:
            self.llm = LLM(model=model.name_or_path)
        self.generation_config = SamplingParams(n=2)

    def get_train_dataloader(self):
        dataloader_params["worker_init_fn"] = seed_worker

    def _generate_vllm(self, model, prompts):
        llm_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        llm_model.load_weights(model.state_dict().items())
        if prompts:
            outputs = self.llm.chat(prompts, self.generation_config)
        else:
            outputs = self.llm.generate(prompts, self.generation_config)
        return outputs

    def training_step(self, loss):
        if self.use_apex:
            loss.scale()

    def _maybe_log_save_evaluate(self, tr_loss):
        return self._nested_gather(tr_loss).mean().item()
"""

FILES = {
    "__init__.py": '__version__ = "0.18.2"\n',
    "import_utils.py": "from transformers.utils.import_utils import _is_package_available\n",
    "trainer/__init__.py": "",
    "trainer/grpo_config.py": CONFIG.format(name="GRPOConfig"),
    "trainer/grpo_trainer.py": GRPO,
    "trainer/online_dpo_config.py": CONFIG.format(name="OnlineDPOConfig"),
    "trainer/online_dpo_trainer.py": ONLINE_DPO,
}

TARGETS = ["grpo", "grpo_config", "online_dpo", "online_dpo_config", "import_utils"]


class Run(Protocol):
    def __call__(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def trl(tmp_path: Path) -> Path:
    """A directory that holds the small TRL."""
    for name, text in FILES.items():
        path = tmp_path / "site" / "trl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "site"


@pytest.fixture
def trlpatch(tmp_path: Path) -> Run:
    """Run `python -m trlpatch <words>` with the small TRL, where there is one, on sys.path."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-m", "trlpatch", *map(str, words)],
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "TRLPATCH_CACHE_DIR": str(tmp_path / "cache"), **environment},
            check=False,
            timeout=120,
            cwd=tmp_path,
        )

    return run


@pytest.fixture
def drifted(trl: Path) -> Path:
    """The small TRL with a rollout call that the patches do not expect."""
    path = trl / "trl" / "trainer" / "grpo_trainer.py"
    extra = "        more = self.llm.generate(prompts)\n        return outputs"
    path.write_text(GRPO.replace("        return outputs", extra), encoding="utf-8")
    return trl


def fails(result: subprocess.CompletedProcess[str], status: int, *texts: str) -> None:
    """Assert a failure with one message on stderr and no traceback."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr


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
    assert "trl 0.18.2 demands transformers>=4.50.0, and 4.49.0 is there. (metadata of trl)" in result.stdout


def install(site: Path, **versions: str) -> None:
    """Make distributions look installed beside the small TRL."""
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


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


def test_status_ends_with_the_verdict_on_versions(trl: Path, trlpatch: Run) -> None:
    install(trl, vllm="0.30.0", transformers="5.19.0")
    done = trlpatch("status")
    assert done.returncode == 0
    assert "versions   untested: TRL 0.18.2, vLLM 0.30.0, transformers 5.19.0" in done.stdout
    assert json.loads(trlpatch("status", "--json").stdout)["verdict"]["state"] == "untested"


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
        (["plan", "GRPOTrainer"], ["Unknown target 'GRPOTrainer'; did you mean 'grpo'?"]),
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
        (["run", "absent.py"], ["cannot run 'absent.py'"]),
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


def in_terminal(words: list[str], environment: dict[str, str], columns: int) -> str:
    """What a terminal of so many columns is sent."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, "-m", "trlpatch", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                sent += os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
    os.close(ours)
    assert process.returncode == 0, sent
    return sent.decode().replace("\r\n", "\n")


def test_a_script_that_is_run_has_its_random_state(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import random, sys\nfrom trlpatch import patch\nrandom.seed(0)\nprint(patch(), 'rich' in sys.modules)\n"
        "assert random.random() == random.Random(0).random()\n",
        encoding="utf-8",
    )
    done = trlpatch("run", "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False")


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


@pytest.fixture
def script(trl: Path, tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_run_passes_every_argument_on(script: Callable[[str], Path], trlpatch: Run) -> None:
    script("import sys\nfrom trl.trainer import grpo_trainer\nprint(sys.argv[1:], grpo_trainer._trlpatch.__name__)\n")
    result = trlpatch("run", "script.py", "--help", "-m", "--", "--skip=x")
    assert result.stdout == "['--help', '-m', '--', '--skip=x'] trlpatch.hooks\n", result.stderr


def test_run_runs_modules(script: Callable[[str], Path], trlpatch: Run) -> None:
    script("import sys\nprint(__name__, sys.argv[1:])\n")
    assert trlpatch("run", "-m", "script", "-x").stdout == "__main__ ['-x']\n"


def test_run_keeps_the_scripts_exit_status_and_traceback(script: Callable[[str], Path], trlpatch: Run) -> None:
    script("raise SystemExit(7)")
    assert trlpatch("run", "script.py").returncode == 7
    script("from trlpatch.errors import StaleAdapter\nraise StaleAdapter('while training')\n")
    result = trlpatch("run", "script.py")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "StaleAdapter: while training" in result.stderr


def test_run_explains_drift_without_a_traceback(drifted: Path, script: Callable[[str], Path], trlpatch: Run) -> None:
    script("print('never')")
    result = trlpatch("run", "script.py")
    fails(result, 1, "rollout_call: expected 1, found 2")
    assert result.stdout == ""


def test_a_reader_that_leaves_gets_no_message(trl: Path) -> None:
    code = "import sys; sys.argv = ['trlpatch', 'list']; from trlpatch.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""


def test_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; from trlpatch.cli import cli; cli(['cache', 'path'], standalone_mode=False);"
        "print(sorted({'libcst', 'rich', 'torch', 'trl', 'vllm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_explains_itself() -> None:
    from click.testing import CliRunner

    for name in cli.commands:
        assert cli.commands[name].help, name
    assert set(cli.commands) == {"list", "plan", "diff", "dump", "check", "status", "cache", "run", "demo", "doctor"}
    assert CliRunner().invoke(cli, ["run", "--help"]).exit_code == 0
