"""Write examples/notebooks/*.ipynb from the scripts beside them: `python -m tests.notebooks`.

A notebook's source is its script in the percent format, which people can diff, lint and review; what runs on Colab is
made from it by jupytext, the same bytes each time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1] / "examples" / "notebooks"


def scripts() -> list[Path]:
    """Return the sources, in order of their names."""
    return sorted(HOME.glob("*.py"))


def converted(script: Path) -> str:
    """Return the text of the notebook that a script is the source of."""
    import jupytext
    import nbformat

    notebook: Any = jupytext.read(script, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # else a random one each time
    notebook.metadata = {
        "accelerator": "GPU",
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)) + "\n"


def main() -> int:
    for script in scripts():
        path, text = script.with_suffix(".ipynb"), converted(script)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(HOME.parents[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
