"""`trlpatch run` and worker processes, in interpreters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SKIP

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = f"""
import sys
from trlpatch.options import Options
from trlpatch.runtime.run import run_script
run_script(sys.argv[1:], Options("grpo", skip={SKIP!r}))
"""
SCRIPT = """\
import sys, trl
print(__name__, sys.argv, sys.path[0], __file__, sys.modules["__main__"].__dict__ is globals())
print("_trlpatch" in vars(sys.modules[trl.GRPOTrainer.__module__]))
import beside
if "fail" in sys.argv:
    trl.GRPOTrainer("bad")
sys.exit(7)
"""


@pytest.fixture
def run(fake_trl, tmp_path):
    def call(*argv, **extra):
        return subprocess.run(
            [sys.executable, "-c", RUN, *argv],
            env=fake_trl.environment(**extra),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=tmp_path,
        )

    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/train.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "scripts/beside.py").write_text("", encoding="utf-8")
    return call


def test_script_runs_as_python_would_run_it(run, tmp_path):
    done = run("scripts/train.py", "--lr", "1")
    assert done.returncode == 7, done.stderr
    first, second = done.stdout.splitlines()
    directory = tmp_path.resolve() / "scripts"
    assert first == f"__main__ ['scripts/train.py', '--lr', '1'] {directory} scripts/train.py True"
    assert second == "True"


def test_module_runs_as_python_would_run_it(run, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/train.py").write_text(
        "import sys, trl\nprint(__name__, sys.argv[1:], sys.path[0], __spec__.name)\n"
    )
    done = run("-m", "package.train", "x")
    assert done.stdout.split(maxsplit=3) == ["__main__", "['x']", str(tmp_path.resolve()), "package.train\n"], (
        done.stderr
    )


def test_safe_path_is_respected(run, tmp_path):
    (tmp_path / "scripts/safe.py").write_text("import sys\nprint(sys.path[0])\n", encoding="utf-8")
    for argv in (["scripts/safe.py"], ["-m", "scripts.safe"]):
        done = run(
            *argv, PYTHONSAFEPATH="1", PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{REPOSITORY}{os.pathsep}{tmp_path}"
        )
        assert done.stdout == f"{tmp_path / 'site'}\n", done.stderr


def test_directory_with_a_main_runs(run, tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/__main__.py").write_text(
        "import sys, here\nprint(__name__, sys.argv, sys.path[0], '' in sys.path)\n"
    )
    (tmp_path / "app/here.py").write_text("")
    assert run("app", "x").stdout == "__main__ ['app', 'x'] app False\n"


def test_traceback_shows_the_patched_file(run):
    done = run("scripts/train.py", "fail")
    assert done.returncode == 1
    assert 'raise RuntimeError("bad model")' in done.stderr
    assert "cache/v1/" in done.stderr


def test_without_a_cache_it_runs_with_one_warning(run, tmp_path):
    (tmp_path / "blocked").write_text("")
    done = run("scripts/train.py", TRLPATCH_CACHE_DIR=str(tmp_path / "blocked"))
    assert done.returncode == 7
    assert done.stdout.splitlines()[1] == "True"
    assert done.stderr.count("CacheUnavailable") == 1


@pytest.mark.parametrize(
    ("argv", "message"), [((), "nothing to run"), (("-m",), "nothing to run"), (("no.py",), "no such file")]
)
def test_nothing_to_run_is_said(run, argv, message):
    done = run(*argv)
    assert done.returncode == 1
    assert "InvalidOption" in done.stderr
    assert message in done.stderr


def test_spawn_workers_take_classes_and_configs(fake_trl, tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(
        f"""
import multiprocessing, sys, trlpatch
trlpatch.PatchFastRL("grpo", skip={SKIP!r})
import trl

def work(cls, config):
    module = sys.modules[cls.__module__]
    same = cls is trl.GRPOTrainer and type(config) is trl.GRPOConfig
    return same, config.vllm_sampling_params, "_trlpatch" in vars(module)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(work, (trl.GRPOTrainer, trl.GRPOConfig(vllm_sampling_params={{"min_p": 0.5}}))))
""",
        encoding="utf-8",
    )
    done = fake_trl.python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert done.stdout == "(True, {'min_p': 0.5}, True)\n", done.stderr
