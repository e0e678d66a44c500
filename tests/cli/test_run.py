"""`trlpatch run`, and what every command has in common."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.small_trl import ROOT, Run, fails
from trlpatch.cli import cli, main
from trlpatch.runtime import run as runner


def test_a_script_that_is_run_has_its_random_state(trl: Path, trlpatch: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import random, sys\nfrom trlpatch import patch\nrandom.seed(0)\nprint(patch(), 'rich' in sys.modules)\n"
        "assert random.random() == random.Random(0).random()\n",
        encoding="utf-8",
    )
    done = trlpatch("run", "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False")


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


def test_what_a_script_raises_is_not_what_click_makes_of_it(script: Callable[[str], Path], trlpatch: Run) -> None:
    script("input()")
    result = trlpatch("run", "script.py")
    assert (result.returncode, "EOFError" in result.stderr, "Abort" in result.stderr) == (1, True, False)
    script("raise KeyboardInterrupt")
    result = trlpatch("run", "script.py")
    assert result.returncode == -signal.SIGINT
    assert result.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "Abort" not in result.stderr


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trlpatch: Run) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    for name in ("list", "plan", "diff", "check", "status", "demo", "run"):
        monkeypatch.setattr(cli.commands[name], "callback", interrupt)
        monkeypatch.setattr(sys, "argv", ["trlpatch", name])
        with pytest.raises(SystemExit) as left:
            main()
        assert (name, left.value.code) == (name, 130)
        assert capsys.readouterr().err.strip() == "interrupted"


def test_ctrl_c_while_run_patches_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "apply", interrupt)
    monkeypatch.setattr(sys, "argv", ["trlpatch", "run", "-m", "this"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_run_says_what_it_patched_unless_told_not_to(script: Callable[[str], Path], trlpatch: Run) -> None:
    script("")
    (line,) = trlpatch("run", "script.py").stderr.splitlines()
    assert line.startswith("trlpatch: TRL 0.18.2, ")
    for option in ("-q", "--quiet"):
        assert trlpatch("run", option, "script.py").stderr == ""
    assert trlpatch("run", "script.py", TRLPATCH_QUIET="1").stderr == ""
    assert trlpatch("run", "script.py", TRLPATCH_QUIET="0").stderr != ""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("nosuch", "No module named nosuch"),
        ("nosuch.train", "No module named nosuch"),
        ("package.nosuch", "No module named package.nosuch"),
        ("package", "No module named package.__main__; 'package' is a package and cannot be directly executed"),
    ],
)
def test_a_module_that_is_not_there_is_pythons_message(
    trl: Path, trlpatch: Run, tmp_path: Path, module: str, said: str
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("", encoding="utf-8")
    result = trlpatch("run", "--quiet", "-m", module)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"{sys.executable}: {said}\n"


def test_a_module_that_fails_to_import_another_has_its_traceback(script: Callable[[str], Path], trlpatch: Run) -> None:
    script("import nosuch")
    result = trlpatch("run", "-m", "script")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ModuleNotFoundError: No module named 'nosuch'" in result.stderr


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
    _, errors = process.communicate(timeout=300)
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
    assert set(cli.commands) == {
        "list", "plan", "diff", "dump", "check", "status", "cache", "run", "demo", "doctor", "export", "serve",
        "scale",
    }  # fmt: skip
    assert CliRunner().invoke(cli, ["run", "--help"]).exit_code == 0
