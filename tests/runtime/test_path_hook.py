"""Import hooks that are installed after ours and ask `PathFinder` (typeguard), and beartype's, which replace it."""

from __future__ import annotations

import pkgutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests.helpers import SKIP
from trlpatch.runtime.loader import ModuleSource, PatchedFinder

PATCH = f"import trlpatch\nreport = trlpatch.PatchFastRL('grpo', skip={SKIP!r})\n"
TYPEGUARD = "from typeguard import install_import_hook\ninstall_import_hook('trl')\n"
BEARTYPE = "from beartype.claw import beartype_package\nbeartype_package('trl')\n"
SHOW = """
import sys, trl
import trl.trainer.grpo_trainer as module
print("_trlpatch" in vars(module), module.__file__ == report.files["grpo"], report.bypassed)
print(type(module.__loader__).__name__, type(sys.modules["trl.trainer.base_config"].__loader__).__name__)
"""


def test_typeguard_after_us_checks_the_patched_file(fake_trl):
    pytest.importorskip("typeguard")
    done = fake_trl.python(PATCH + TYPEGUARD + SHOW)
    assert done.stdout == "True True ()\nTypeguardLoader TypeguardLoader\n", done.stderr


def test_typeguard_before_us_leaves_the_patched_modules_alone(fake_trl):
    pytest.importorskip("typeguard")
    done = fake_trl.python(TYPEGUARD + PATCH + SHOW)
    assert done.stdout == "True True ()\nPatchedLoader TypeguardLoader\n", done.stderr


@pytest.mark.parametrize("order", [TYPEGUARD + BEARTYPE, BEARTYPE + TYPEGUARD])
def test_both_after_us(fake_trl, order):
    pytest.importorskip("typeguard")
    pytest.importorskip("beartype")
    done = fake_trl.python(PATCH + order + SHOW)
    assert done.stdout.startswith("True True ()\nTypeguardLoader"), done.stderr


@pytest.mark.parametrize("order", [PATCH + BEARTYPE, BEARTYPE + PATCH])
def test_beartype_leaves_the_patched_modules_alone(fake_trl, order):
    pytest.importorskip("beartype")
    done = fake_trl.python(order + SHOW)
    assert done.stdout == "True True ()\nPatchedLoader BeartypeSourceFileLoader\n", done.stderr


def test_typeguard_after_us_in_a_directory_that_was_looked_at_before(fake_trl):
    pytest.importorskip("typeguard")
    done = fake_trl.python("import trl.trainer.base_config\n" + PATCH + TYPEGUARD + SHOW)
    assert done.stdout.startswith("True True ()\nTypeguardLoader"), done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    directory = tmp_path / "site" / "trlpatch_hooked" / "trainer"
    directory.mkdir(parents=True)
    for file in ("../__init__.py", "__init__.py", "one.py", "two.py"):
        (directory / file).write_text("patched = False\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield directory
    for name in [name for name in sys.modules if name.startswith("trlpatch_hooked")]:
        del sys.modules[name]


def source(name, package=None):
    return ModuleSource(name, Path("memory.py"), "patched = True\n", on_disk=False, package=package)


def found(name, directory):
    spec = PathFinder.find_spec(name, [str(directory)])
    return type(spec.loader).__name__


def test_pathfinder_finds_patched_modules_while_they_are_claimed(package):
    hooks, finder = list(sys.path_hooks), PatchedFinder()
    name = "trlpatch_hooked.trainer.one"
    assert found(name, package) == "SourceFileLoader"
    finder.claim({name: source(name)})
    assert found(name, package) == "PatchedLoader"
    assert found("trlpatch_hooked.trainer.two", package) == "SourceFileLoader"
    assert {one.name for one in pkgutil.iter_modules([str(package)])} == {"one", "two"}
    finder.claim({})
    assert len(sys.path_hooks) == len(hooks) + 1
    finder.restore({})
    assert found(name, package) == "SourceFileLoader"
    assert sys.path_hooks == hooks


def test_pathfinder_finds_a_patched_package(package):
    finder = PatchedFinder()
    own = package.parent / "__init__.py"
    finder.claim({"trlpatch_hooked": source("trlpatch_hooked", own)})
    assert found("trlpatch_hooked", package.parent.parent) == "PatchedLoader"
    finder.restore({})
    assert found("trlpatch_hooked", package.parent.parent) == "SourceFileLoader"
