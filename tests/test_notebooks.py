"""The notebooks of examples/notebooks are made from the scripts beside them, and have the form that tests rely on."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.sources import ROOT
from tests.notebooks import HOME, converted, scripts

SCRIPTS = scripts()
LONGEST_CELL = 60  # lines; the reader has one screen


def cells(script: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_what_its_script_gives(script: Path) -> None:
    pytest.importorskip("jupytext")
    held = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert held == converted(script), "run: python -m tests.notebooks"


def test_every_notebook_has_a_script() -> None:
    assert {path.stem for path in HOME.glob("*.ipynb")} == {path.stem for path in SCRIPTS} != set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_parameters_are_one_cell_of_plain_values(script: Path) -> None:
    """What papermill, and tests/cpu/notebook_runs.py, put their own values behind."""
    (cell,) = [cell for cell in cells(script) if "parameters" in cell["metadata"].get("tags", ())]
    names = []
    for node in ast.parse("".join(cell["source"])).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
        names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    assert {"MODEL", "OUT", "STEPS", "LEARNING_RATE", "ENGINE"} <= set(names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_cells_are_short_and_explained_and_hold_no_output(script: Path) -> None:
    found = cells(script)
    assert found[0]["cell_type"] == "markdown"
    assert found[0]["source"][0].startswith("# ")
    assert max(len(cell["source"]) for cell in found) <= LONGEST_CELL
    assert not any(cell.get("outputs") for cell in found)
    explained = sum(cell["cell_type"] == "markdown" for cell in found)
    assert explained >= len(found) / 3


def test_each_has_a_row_in_the_list() -> None:
    for document in ("docs/notebooks.md",):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert [script.stem for script in SCRIPTS if f"/{script.stem}.ipynb)" not in text] == []
