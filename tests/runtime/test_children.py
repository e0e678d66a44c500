"""Child processes of `trlpatch run`, each a python of its own, with the tiny TRL."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import SKIP
from trlpatch.errors import InvalidOption
from trlpatch.options import CHILDREN, Options
from trlpatch.runtime import children
from trlpatch.runtime.children import BOOTSTRAP, environment_for, inherited_options

RUN = f"""
import sys
from trlpatch.options import Options
from trlpatch.runtime.run import run_script
run_script(sys.argv[1:], Options("grpo", sleep="kv", skip={SKIP!r}))
"""
PROBE = """\
import sys, trl
from trlpatch.options import active
print("_trlpatch" in vars(sys.modules[trl.GRPOTrainer.__module__]), active().algorithm, active().sleep, flush=True)
"""
PATCHED = "True grpo kv\n"


@pytest.fixture
def run(fake_trl, tmp_path):
    """Run words under `trlpatch run`, in a directory with `probe.py`; keywords are environment variables."""

    def call(*argv, **extra):
        return subprocess.run(
            [sys.executable, "-c", RUN, *map(str, argv)],
            env=fake_trl.environment(**extra),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=tmp_path,
        )

    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    return call


@pytest.fixture
def child(fake_trl, tmp_path):
    """Run python code as a child of a `trlpatch run` would."""

    def call(code, *flags, options=None, **extra):
        environment = fake_trl.environment(**extra)
        environment |= environment_for(options or Options("grpo", skip=SKIP), environment)
        return subprocess.run(
            [sys.executable, *flags, "-c", code],
            env={name: value for name, value in environment.items() if value},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=tmp_path,
        )

    return call


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run([sys.executable, 'probe.py'], check=True)",
        "subprocess.run([sys.executable, '-m', 'probe'], check=True)",
        "subprocess.run([sys.executable, '-P', 'probe.py'], check=True)",
        "subprocess.run(['sh', '-c', sys.executable + ' probe.py'], check=True)",
    ],
)
def test_children_of_a_script_are_patched_with_its_options(run, tmp_path, start):
    (tmp_path / "parent.py").write_text(f"import subprocess, sys\n{start}\n", encoding="utf-8")
    done = run("parent.py")
    assert (done.returncode, done.stdout) == (0, PATCHED), done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing_workers_are_patched(run, tmp_path, method):
    (tmp_path / "parent.py").write_text(
        "import multiprocessing\n"
        "def work():\n"
        "    import probe\n"
        "if __name__ == '__main__':\n"
        f"    worker = multiprocessing.get_context({method!r}).Process(target=work)\n"
        "    worker.start()\n"
        "    worker.join()\n",
        encoding="utf-8",
    )
    done = run("parent.py")
    assert (done.returncode, done.stdout) == (0, PATCHED), done.stderr


def test_a_program_replaces_the_process_and_is_patched(run, tmp_path):
    program = tmp_path / "bin" / "launcher"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n"{sys.executable}" probe.py\necho "$@"\nexit 7\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    for word in ("launcher", "bin/launcher"):
        done = run(word, "-m", "--x", PATH=path)
        assert (done.returncode, done.stdout) == (7, f"{PATCHED}-m --x\n"), done.stderr
    assert run(sys.executable, "-m", "probe").stdout == PATCHED


def test_a_directory_named_like_a_program_does_not_hide_it(run, tmp_path):
    (tmp_path / "env").mkdir()
    assert run("env", sys.executable, "probe.py").stdout == PATCHED


def test_one_line_says_what_was_patched(run, tmp_path):
    (tmp_path / "parent.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {RUN!r}, 'probe.py'])\n", encoding="utf-8"
    )
    line = (
        "trlpatch: TRL 0.25.0, 2 patches applied, child processes included; trainers grpo; "
        f"options algorithm='grpo' sleep='kv' skip={SKIP!r}\n"
    )
    done = run("parent.py")
    assert (done.stdout, done.stderr) == (PATCHED, line)
    assert run("probe.py", RANK="0", LOCAL_RANK="0").stderr == line
    assert run("probe.py", RANK="3", LOCAL_RANK="0").stderr == ""
    assert run("probe.py", LOCAL_RANK="1").stderr == ""
    assert run("probe.py", TRLPATCH_DISABLE="1").stderr == "trlpatch: disabled by TRLPATCH_DISABLE, TRL is stock\n"


@pytest.mark.usefixtures("unmeasured")
def test_a_child_without_trl_imports_nothing_of_trlpatch(child):
    done = child(
        "import sys, importlib.util\n"
        "spec = importlib.util.find_spec('trl')\n"
        "print(spec.origin.endswith('__init__.py'), spec.loader.get_source('trl') is not None)\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('trlpatch', 'json', 'trl')])\n"
    )
    assert done.stdout == "True True\n[]\n", done.stderr


def test_the_hook_leaves_when_trl_is_patched(child):
    done = child(
        "import sys, trl, pkgutil\n"
        "print([type(f).__name__ for f in sys.meta_path if 'Before' in type(f).__name__], len(sys.path_hooks))\n"
        "print(type(trl.__spec__.loader).__name__, trl.__loader__ is trl.__spec__.loader)\n"
        "import trl.trainer\n"
        "print('grpo_trainer' in [one.name for one in pkgutil.iter_modules(trl.trainer.__path__)])\n"
    )
    assert done.stdout == "[] 3\nSourceFileLoader True\nTrue\n", done.stderr


def test_a_child_that_patches_itself_keeps_its_options(child):
    done = child(
        f"import trlpatch\ntrlpatch.PatchFastRL('grpo', sleep='off', skip={SKIP!r})\n" + PROBE,
        options=Options("grpo", sleep="kv"),
    )
    assert done.stdout == "True grpo off\n", done.stderr


def test_disabled_children_are_stock(child):
    assert child(PROBE, TRLPATCH_DISABLE="1").stdout.startswith("False")


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_children_that_read_no_pythonpath_or_no_sitecustomize_are_stock(child, fake_trl, flag):
    code = f"import sys\nsys.path.insert(0, {str(fake_trl.site)!r})\nimport trl\n"
    done = child(f"{code}print(trl.GRPOTrainer.__module__, 'trlpatch' in sys.modules)", flag)
    assert done.stdout == "trl.trainer.grpo_trainer False\n", done.stderr


def test_drift_in_a_child_is_an_error_each_time_trl_is_imported(child, fake_trl):
    fake_trl.drift()
    done = child("try:\n    import trl\nexcept Exception as error:\n    print(type(error).__name__)\nimport trl")
    assert (done.returncode, done.stdout) == (1, "AnchorDrift\n")
    assert "trlpatch.errors.AnchorDrift: " in done.stderr


def test_a_patched_package_runs_patched(child, fake_trl):
    """What is done to `trl` itself, as in some old releases, is there when a child imports it."""
    done = child(
        "from trlpatch.runtime import session\n"
        "from trlpatch.runtime.loader import ModuleSource, PatchedFinder\n"
        "from pathlib import Path\n"
        f"own = Path({str(fake_trl.root / '__init__.py')!r})\n"
        "def apply(options):\n"
        "    text = 'patched = True\\n'\n"
        "    PatchedFinder().claim({'trl': ModuleSource('trl', own.parent / 'x.py', text, False, package=own)})\n"
        "session.apply = apply\n"
        "import trl\n"
        "print(trl.patched, type(trl.__loader__).__name__, trl.__spec__._initializing)\n"
    )
    assert done.stdout == "True PatchedLoader False\n", done.stderr


@pytest.mark.parametrize("order", [lambda ours, other: [ours, other], lambda ours, other: [other, ours]])
def test_another_sitecustomize_runs_once(child, tmp_path, order):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/sitecustomize.py").write_text("import sys\nsys.ran = getattr(sys, 'ran', 0) + 1\n")
    code = "import sys, sitecustomize\nprint(sys.ran, sitecustomize.__file__)\n"
    done = child(code + PROBE, PYTHONPATH=os.pathsep.join([str(tmp_path / "other"), *_path(tmp_path)]))
    assert done.stdout == f"1 {tmp_path / 'other/sitecustomize.py'}\nTrue grpo auto\n", done.stderr


def _path(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "site"), str(Path(__file__).resolve().parents[2])]


def test_an_error_of_another_sitecustomize_is_told_as_python_tells_it(child, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/sitecustomize.py").write_text("1 / 0\n")
    path = os.pathsep.join([str(tmp_path / "other"), *_path(tmp_path)])
    done = child(PROBE, PYTHONPATH=path)
    assert done.stdout == "True grpo auto\n"
    assert "Error in sitecustomize" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_without_another_sitecustomize_ours_is_the_module(child):
    done = child("import sys, sitecustomize\nprint(sitecustomize.__file__, sys.path.count(sys.argv[0]))")
    assert done.stdout.startswith(BOOTSTRAP), done.stderr


def test_a_python_that_cannot_import_trlpatch_takes_the_one_of_the_parent(child):
    done = child(
        "import os, sys\n"
        "sys.path[:] = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, 'trlpatch'))]\n"
        "before = sys.path[:]\n" + PROBE + "print(sys.path == before)\n"
    )
    assert done.stdout == "True grpo auto\nTrue\n", done.stderr


def test_what_keeps_trlpatch_from_being_imported_is_an_error(child):
    done = child("import sys\nsys.modules['trlpatch.runtime.children'] = None\nimport trl")
    assert done.returncode == 1
    assert "RuntimeError: trlpatch run: this process imports trl" in done.stderr


def test_a_launcher_that_passes_the_variable_not_on_is_told_of(child):
    code = f"import os\ndel os.environ[{CHILDREN!r}]\nfrom trlpatch.runtime import session\n"
    done = child(
        code + "session.apply = lambda options: print(options.sleep)\nimport trl", options=Options(sleep="kv")
    )
    assert done.stdout == "auto\n"
    assert f"{CHILDREN} is not set" in done.stderr


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"sleep": "x"}', '{"frobnicate": 1}'])
def test_options_that_cannot_be_read_are_an_error(text):
    with pytest.raises(InvalidOption, match=CHILDREN):
        inherited_options({CHILDREN: text})


def test_options_come_back_as_they_were():
    options = Options("grpo", "always", "kv", "request", "stock", ("b", "a"), "reuse")
    assert inherited_options(environment_for(options, {})) == options


def test_pythonpath_keeps_what_it_had():
    entry = environment_for(Options(), {})["PYTHONPATH"]
    assert entry == environment_for(Options(), {"PYTHONPATH": ""})["PYTHONPATH"] == BOOTSTRAP
    once = environment_for(Options(), {"PYTHONPATH": f"{os.pathsep}/a"})["PYTHONPATH"]
    assert once == environment_for(Options(), {"PYTHONPATH": once})["PYTHONPATH"]
    assert once.split(os.pathsep) == [BOOTSTRAP, "", "/a"]


def test_child_environment_says_what_is_in_force(fake_trl, patch_grpo, monkeypatch):
    assert json.loads(children.child_environment()[CHILDREN])["algorithm"] is None
    patch_grpo(sleep="kv")
    handed = json.loads(children.child_environment()[CHILDREN])
    assert (handed["algorithm"], handed["sleep"], tuple(handed["skip"])) == ("grpo", "kv", SKIP)
    monkeypatch.setattr(children, "target_names", lambda algorithm: frozenset({"rloo"}))
    assert json.loads(children.child_environment()[CHILDREN])["algorithm"] is None


def test_a_finder_in_front_that_answers_for_trl_does_not_keep_a_child_stock(child):
    """typeguard's does, where a child installs it before it imports TRL: the submodules' directory is noticed."""
    done = child(
        "import sys\nfrom importlib.machinery import PathFinder\n"
        "class Wrapping:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        return PathFinder.find_spec(name, path, target) if name.startswith('trl') else None\n"
        "sys.meta_path.insert(0, Wrapping)\n" + PROBE
    )
    assert done.stdout == "True grpo auto\n", done.stderr
