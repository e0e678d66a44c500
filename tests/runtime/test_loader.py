from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import io
import linecache
import pdb
import pkgutil
import sys
from pathlib import Path

import pytest

from trlpatch.runtime.loader import ModuleSource, PatchedFinder, spec_of

TEXT = "def answer():\n    return 42\n"


@pytest.fixture
def source(tmp_path: Path) -> ModuleSource:
    path = tmp_path / "entry" / "grpo_trainer.py"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    return ModuleSource("trlpatch_test_package.grpo_trainer", path, TEXT, on_disk=True)


@pytest.fixture
def finder(tmp_path, monkeypatch, source):
    package = tmp_path / "site" / "trlpatch_test_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "grpo_trainer.py").write_text("stock = True\n", encoding="utf-8")
    (package / "other.py").write_text("stock = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    finder = PatchedFinder()
    finder.claim({source.module: source})
    yield finder
    finder.restore({})
    for name in [name for name in sys.modules if name.startswith("trlpatch_test_package")]:
        del sys.modules[name]


def test_claims_exact_names_only(finder, source):
    assert finder.find_spec(source.module) is not None
    for name in ("grpo_trainer", source.module + ".sub", "trlpatch_test_package", "os"):
        assert finder.find_spec(name) is None
    assert importlib.import_module("trlpatch_test_package.other").stock


def test_module_looks_like_any_other(finder, source):
    module = importlib.import_module(source.module)
    assert module.answer() == 42
    assert module.answer.__code__.co_filename == module.__file__ == str(source.path)
    assert module.__package__ == "trlpatch_test_package"
    assert module.__spec__.submodule_search_locations is None
    assert sys.modules["trlpatch_test_package"].grpo_trainer is module
    assert importlib.reload(module) is module
    assert module.answer() == 42


def test_a_package_finds_its_data_files_and_submodules_beside_its_own_file(finder, tmp_path):
    own = tmp_path / "site" / "trlpatch_test_package" / "__init__.py"
    (own.parent / "templates").mkdir()
    (own.parent / "templates" / "card.md").write_text("a card", encoding="utf-8")
    run = tmp_path / "entry" / "__init__.py"
    run.write_text(TEXT, encoding="utf-8")
    finder.claim({own.parent.name: ModuleSource(own.parent.name, run, TEXT, on_disk=True, package=own)})
    package = importlib.import_module(own.parent.name)
    assert package.answer() == 42
    assert package.__file__ == str(own)
    assert importlib.resources.files(package).joinpath("templates/card.md").read_text(encoding="utf-8") == "a card"
    assert pkgutil.get_data(package.__name__, "templates/card.md") == b"a card"
    assert importlib.import_module("trlpatch_test_package.other").stock


def test_other_hooks_may_wrap_it(finder, source):
    seen = []

    class Wrapping:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == source.module and not seen:
                seen.append(name)
                return importlib.util.find_spec(name)
            return None

    sys.meta_path.insert(0, Wrapping)
    try:
        assert importlib.import_module(source.module).answer() == 42
    finally:
        sys.meta_path.remove(Wrapping)
    assert seen


def test_claiming_twice_installs_once(finder, source):
    finder.claim({"x": source})
    assert sys.meta_path.count(finder) == 1
    assert set(finder.sources) == {"x", source.module}
    finder.restore({})
    assert finder not in sys.meta_path


def test_byte_code_is_kept_beside_the_file(finder, source, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    module = importlib.import_module(source.module)
    byte_code = Path(module.__cached__)
    assert byte_code.parent.parent == source.path.parent
    assert byte_code.exists()
    size = byte_code.stat().st_size
    for damaged in (byte_code.read_bytes()[: size // 2], b"garbage", byte_code.read_bytes()[:16] + b"\xff" * 50):
        byte_code.write_bytes(damaged)
        del sys.modules[source.module]
        assert importlib.import_module(source.module).answer() == 42


def test_text_that_was_verified_runs_even_if_the_file_changes(finder, source):
    source.path.unlink()
    module = importlib.import_module(source.module)
    assert module.answer() == 42
    assert module.__loader__.get_source(source.module) == TEXT


def test_memory_writes_nothing(tmp_path):
    path = tmp_path / "nowhere" / "memory.py"
    source = ModuleSource("trlpatch_test_memory", path, TEXT, on_disk=False)
    spec = spec_of(source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.answer() == 42
    assert linecache.getline(str(path), 2) == "    return 42\n"
    linecache.checkcache()
    assert linecache.getline(str(path), 2) == "    return 42\n"
    assert not path.parent.exists()


@pytest.mark.parametrize("on_disk", [True, False])
def test_pdb_steps_through_the_patched_file(finder, source, on_disk):
    if not on_disk:
        source.path.unlink()
        source = ModuleSource(source.module, source.path, TEXT, on_disk=False)
        finder.claim({source.module: source})
    module = importlib.import_module(source.module)
    output = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO("list\ncontinue\n"), stdout=output, nosigint=True, readrc=False)
    debugger.use_rawinput = False
    debugger.runcall(module.answer)
    assert "-> return 42" in output.getvalue()
    assert "def answer():" in output.getvalue()
