"""Class search: which files of a TRL define a class, by `ast`, for what is not where the target table has it."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path


def class_files(package: Path, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the files that define each of the classes `names`, as `trl/trainer/grpo_trainer.py`.

    Classes that no file defines are left out; so are files that are not Python.

    Args:
        package: the `trl` package directory. All of it is read; only files that hold a name are parsed.
    """
    wanted = {name: f"class {name}".encode() for name in names}
    found: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")) if wanted else ():
        for name in _defined(path, wanted):
            found.setdefault(name, []).append(f"trl/{path.relative_to(package).as_posix()}")
    return {name: tuple(files) for name, files in found.items()}


def _defined(path: Path, wanted: dict[str, bytes]) -> list[str]:
    try:
        content = path.read_bytes()
        if not any(text in content for text in wanted.values()):
            return []
        tree = ast.parse(content)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return [name for name in wanted if name in classes]
