"""Patch every target of the TRL that can be imported, before or after its import, and take the patches back.

    python -m tests.runtime.real_trl before|after    prints "done" and the number of targets

In a process of its own that has not imported TRL.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import warnings
from types import CodeType, ModuleType
from typing import Any

import trlpatch
from trlpatch.source.locate import find_trl, sources

TARGETS = sources(find_trl())


def modules() -> dict[str, ModuleType]:
    return {source.target.name: importlib.import_module(source.module) for source in TARGETS}


def members(module: ModuleType) -> dict[tuple[str, str], Any]:
    found = {}
    for cls in [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]:
        found |= {(cls.__qualname__, name): value for name, value in vars(cls).items() if name != "__slotnames__"}
    return found


def names(code: CodeType) -> set[str]:
    inner = [names(c) for c in code.co_consts if hasattr(c, "co_names")]
    return set(code.co_names).union(*inner)


def check_patched() -> None:
    report = trlpatch.status()
    loaded = modules()
    for entry in report.applied:
        if entry.target == "trl":  # the package keeps its own __file__
            continue
        source = inspect.getsource(loaded[entry.target])
        assert f"# trlpatch: {entry.patch}" in source, entry
        assert loaded[entry.target].__file__ == report.files[entry.target]
    for source in TARGETS:
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


def check_stock() -> None:
    for name, module in modules().items():
        assert "_trlpatch" not in vars(module)
        assert "_trlpatch" not in inspect.getsource(module)
        for (cls, member), value in members(module).items():
            for function in [value] if inspect.isfunction(value) else []:
                assert "_trlpatch" not in names(inspect.unwrap(function).__code__), (name, cls, member)
        for source in TARGETS:
            if source.target.name == name and source.target.kind == "config":
                config = getattr(module, source.target.classes[0])
                assert "vllm_sampling_params" not in inspect.signature(config).parameters


def before() -> None:
    """Patched before the import, which it is twice."""
    assert "trl" not in sys.modules
    trlpatch.PatchFastRL()
    check_patched()
    trlpatch.unpatch()
    check_stock()
    trlpatch.PatchFastRL()
    check_patched()


def after() -> None:
    """Patched after the import: all is as it was when the patches are taken back."""
    from tests.stock import import_package_table, supply_vllm_names

    supply_vllm_names()  # patched too late for the repairs
    import_package_table()
    loaded = modules()
    then = {name: members(module) for name, module in loaded.items()}
    globals_then = {name: dict(vars(module)) for name, module in loaded.items()}
    codes = {id(v): v.__code__ for m in then.values() for v in m.values() if inspect.isfunction(v)}
    report = trlpatch.PatchFastRL()
    changed = {entry.target for entry in report.applied}
    exchanged = {s.module for s in TARGETS if s.target.name in changed and s.target.kind != "support"}
    assert set(report.rebound) == exchanged, report.rebound
    check_patched()
    trlpatch.unpatch()
    check_stock()
    for name, module in loaded.items():
        now = members(module)
        assert now.keys() == then[name].keys()
        assert all(now[k] is then[name][k] or now[k] == then[name][k] for k in now)
        assert vars(module).keys() == globals_then[name].keys()
        assert all(vars(module)[k] is v for k, v in globals_then[name].items())
    assert all(v.__code__ is codes[id(v)] for m in then.values() for v in m.values() if inspect.isfunction(v))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"before": before, "after": after}[sys.argv[1]]()
    print("done", len(TARGETS))
