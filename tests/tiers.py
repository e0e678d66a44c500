"""Which tier a test is in, by its markers; a pytest plugin that runs one tier: `pytest --tier torch`.

    tier     marker   what a test of it needs
    unit     none     trlpatch and the extra `test`
    torch    torch    torch, transformers and peft, no vLLM: where vLLM is installed it is hidden
    engine   cpu      a real vLLM engine on a CPU; the TRL release makes no difference
    release  release  the same, and the TRL release that can be imported is what is tested (always beside `cpu`)
    gpu      gpu      a CUDA device with vLLM

A test with several is in the last of them. Files without a test of the tier are not imported, so that the unit tier
needs no torch. In a tier a test that is skipped because a package is absent fails.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ports

SPLIT = ("tests/cpu/test_notebooks.py", "tests/cpu/test_ranks.py", "tests/docs/test_pages.py")
"""Files of which each parameter starts a process of its own."""

LONGEST = (
    "tests/cpu/test_old_logps.py",
    "tests/cpu/test_logps.py",
    "tests/cpu/test_features.py",
    "tests/serving/test_served_by_vllm.py",
    "tests/cpu/test_bench_step.py",
    "tests/cpu/test_grpo.py",
    "tests/cpu/test_other_processes.py",
    *SPLIT,
    "tests/cpu/test_rloo.py",
    "tests/cpu/test_repairs.py",
    "tests/cpu/test_fast_model.py",
    "tests/cpu/test_load_adapter.py",
    "tests/cpu/test_compat.py",
)
"""Files with an engine, those that take long first: a worker that starts one last ends a minute after the other."""

TIERS = {"unit": None, "torch": "torch", "engine": "cpu", "release": "release", "gpu": "gpu"}
"""The tiers, each with its marker."""

WITH_ENGINE = ("engine", "release")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trlpatch")
    group.addoption("--tier", choices=TIERS, help="only the tests of this tier, see tests/tiers.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--tier") == "torch":
        sys.modules["vllm"] = None  # type: ignore[assignment]
    if "VLLM_PORT" in os.environ:
        ports.own()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    tier = config.getoption("--tier")
    if tier is None or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    return True if tier not in tiers_of(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.getoption("--tier")
    if tier is None:
        return
    outside = [item for item in items if tier_of({mark.name for mark in item.iter_markers()}) != tier]
    if outside:
        config.hook.pytest_deselected(items=outside)
        items[:] = [item for item in items if item not in set(outside)]
    if tier in WITH_ENGINE:
        items[:] = longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a group of tests with an engine in one process of pytest-xdist."""
    if config.getoption("--tier") not in WITH_ENGINE:
        return None
    from xdist.scheduler.loadfile import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """Return the group of a test: its file, whose fixtures are engines and trainings, or its parameter in SPLIT."""
    file, _, test = nodeid.partition("::")
    return f"{file} {test.partition('[')[2]}" if file in SPLIT else file


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in the order of LONGEST, and after them the others as they are."""
    places = {file: place for place, file in enumerate(LONGEST)}
    return sorted(items, key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    return _complete(collector.config, report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    return _complete(item.config, report)


def _complete(config: pytest.Config, report: pytest.CollectReport | pytest.TestReport) -> object:
    """Make a failure of what `pytest.importorskip` skipped: a tier without its packages would prove less."""
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if config.getoption("--tier") and "could not import" in reason:
        report.outcome = "failed"
        report.longrepr = f"{reason}. The tier {config.getoption('--tier')} must have it: is the marker right?"
    return report


def tier_of(markers: set[str]) -> str:
    """Return the tier of a test with these markers."""
    return [tier for tier, marker in TIERS.items() if marker is None or marker in markers][-1]


def tiers_of(source: str) -> set[str]:
    """Return the tiers that tests of a file with this text may be in: that of its `pytestmark`, and later ones."""
    tree = ast.parse(source)
    of_file = {
        marker
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for marker in _markers(node)
    }
    return {tier_of(of_file)} | {tier_of(of_file | {marker}) for marker in _markers(tree)}


def _markers(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }
