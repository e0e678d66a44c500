"""Every target of the installed TRL, patched before and after its import, in interpreters of their own.

TRLPATCH_TEST_TRL names a directory that holds another `trl` package, such as an unpacked wheel.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests import processes

REPOSITORY = Path(__file__).resolve().parents[2]
CHOSEN = os.environ.get("TRLPATCH_TEST_TRL", "")
LACKING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
if not CHOSEN and importlib.util.find_spec("trl") is None:
    LACKING.append("trl")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(bool(LACKING), reason=f"importing TRL's trainers needs {', '.join(LACKING)}"),
]

COMMON = """
import dataclasses, importlib, inspect, warnings
warnings.simplefilter("ignore")
import trlpatch
from trlpatch.source.locate import find_trl, sources

targets = sources(find_trl())

def modules():
    return {source.target.name: importlib.import_module(source.module) for source in targets}

def members(module):
    found = {}
    for cls in [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]:
        found |= {(cls.__qualname__, name): value for name, value in vars(cls).items() if name != "__slotnames__"}
    return found

def names(code):
    inner = [names(c) for c in code.co_consts if hasattr(c, "co_names")]
    return set(code.co_names).union(*inner)

def check_patched():
    report = trlpatch.status()
    loaded = modules()
    for entry in report.applied:
        if entry.target == "trl":  # the package keeps its own __file__
            continue
        source = inspect.getsource(loaded[entry.target])
        assert f"# trlpatch: {entry.patch}" in source, entry
        assert loaded[entry.target].__file__ == report.files[entry.target]
    for source in targets:
        for name in source.target.classes:
            cls = getattr(loaded[source.target.name], name)
            own = inspect.getsource(cls)
            assert "# trlpatch:" in own, cls
            for method, value in vars(cls).items():
                if inspect.isfunction(value) and inspect.unwrap(value).__code__.co_filename != "<string>":
                    code = inspect.unwrap(value).__code__
                    assert ("_trlpatch" in names(code)) == ("_trlpatch" in inspect.getsource(value)), method
            if source.target.kind == "config":
                assert "vllm_sampling_params" in inspect.signature(cls).parameters, cls
                assert "vllm_sampling_params" in {field.name for field in dataclasses.fields(cls)}
    assert report.bypassed == ()

def check_stock():
    for name, module in modules().items():
        assert "_trlpatch" not in vars(module)
        assert "_trlpatch" not in inspect.getsource(module)
        for (cls, member), value in members(module).items():
            for function in [value] if inspect.isfunction(value) else []:
                assert "_trlpatch" not in names(inspect.unwrap(function).__code__), (name, cls, member)
        for source in targets:
            if source.target.name == name and source.target.kind == "config":
                cls = getattr(module, source.target.classes[0])
                assert "vllm_sampling_params" not in inspect.signature(cls).parameters
"""
LATE = """
trlpatch.PatchFastRL()
check_patched()
trlpatch.unpatch()
check_stock()
trlpatch.PatchFastRL()
check_patched()
print("done", len(targets))
"""
EARLY = """
from tests.stock import import_package_table, supply_vllm_names
supply_vllm_names()  # patched too late for the repairs
import_package_table()
loaded = modules()
before = {name: members(module) for name, module in loaded.items()}
globals_before = {name: dict(vars(module)) for name, module in loaded.items()}
codes = {id(v): v.__code__ for m in before.values() for v in m.values() if inspect.isfunction(v)}
report = trlpatch.PatchFastRL()
changed = {entry.target for entry in report.applied}
exchanged = {s.module for s in targets if s.target.name in changed and s.target.kind != "support"}
assert set(report.rebound) == exchanged, report.rebound
check_patched()
trlpatch.unpatch()
check_stock()
for name, module in loaded.items():
    now = members(module)
    assert now.keys() == before[name].keys()
    assert all(now[k] is before[name][k] or now[k] == before[name][k] for k in now)
    assert vars(module).keys() == globals_before[name].keys()
    assert all(vars(module)[k] is v for k, v in globals_before[name].items())
assert all(v.__code__ is codes[id(v)] for m in before.values() for v in m.values() if inspect.isfunction(v))
print("done", len(targets))
"""


@pytest.mark.parametrize("code", [LATE, EARLY], ids=["patched_before_import", "patched_after_import"])
def test_every_target_is_patched_and_returned(code, tmp_path):
    path = os.pathsep.join(filter(None, [str(REPOSITORY), CHOSEN]))
    done = processes.run(
        [sys.executable, "-c", COMMON + code],
        env={**os.environ, "PYTHONPATH": path, "TRLPATCH_CACHE_DIR": str(tmp_path), "TRL_EXPERIMENTAL_SILENCE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")
