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

import pytest

from tests import ports

TIERS = {"unit": None, "torch": "torch", "engine": "cpu", "release": "release", "gpu": "gpu"}
"""The tiers, each with its marker."""


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
