"""Read the installed vLLM's source: importing it takes seconds and changes the process."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def class_fields(file: str, name: str) -> frozenset[str] | None:
    """Return the annotated fields of a class in `vllm/<file>`; None where vLLM, the file or the class is not there."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec and spec.submodule_search_locations) or ():
        source = Path(place) / file
        if source.is_file():
            for node in ast.parse(source.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    fields = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
                    return frozenset(field.id for field in fields if isinstance(field, ast.Name))
    return None
