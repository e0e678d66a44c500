"""Hold the table, and what trlpatch imports from vLLM, against the sources of one vLLM."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.golden.sources import ROOT
from tests.seams.table import BY_KEYWORD, IMPORTS, MEMBERS, VARIABLES
from tests.seams.tree import PACKAGE, Definition, Tree, parameters
from trlpatch.source.releases import ReleaseRange, parse_release

_WORD = re.compile(r"(\w+)(?:\(([^)]*)\))?((?:>=|<)[\d.]+(?:,(?:>=|<)[\d.]+)*)?")
_VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
_EVERY = ">=0"


@dataclass(frozen=True)
class Seam:
    """One name of vLLM's that trlpatch uses.

    Attributes:
        owner: dotted module, or module and class.
        name: what it must have.
        first: parameters that it takes in this order, from the first on.
        keywords: parameters that it takes by name.
        releases: those that must have it.
    """

    owner: str
    name: str
    first: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    releases: str = _EVERY

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


def seams_of(table: dict[str, str]) -> Iterator[Seam]:
    """Read a table like `MEMBERS`.

    Raises:
        ValueError: a row has something else in it than names.
    """
    for owner, row in table.items():
        if _WORD.sub("", row).strip():
            raise ValueError(f"{owner}: expected names like `wake_up(self, tags)>=0.31`, found {row!r}")
        for name, given, releases in _WORD.findall(row):
            words = [word.strip() for word in given.split(",") if word.strip()]
            by_name = words[:1] == ["*"]
            yield Seam(
                owner,
                name,
                first=() if by_name else tuple(words),
                keywords=tuple(words[1:]) if by_name else (),
                releases=releases or _EVERY,
            )


def imported(folder: Path = ROOT / "trlpatch") -> dict[str, list[str]]:
    """What trlpatch imports of vLLM: module, or module and name -> the files that do.

    Imports for type checkers are left out, and those by `importlib.import_module` counted as modules.
    """
    found: dict[str, list[str]] = {}
    for file, tree in _sources(folder):
        for name in _imports(tree):
            found.setdefault(name, []).append(file)
    return found


@cache
def _sources(folder: Path) -> list[tuple[str, ast.Module]]:
    """Every file of a package with its syntax tree; one vLLM after another is held against them."""
    files = sorted(folder.rglob("*.py"))
    return [(str(file.relative_to(folder.parent)), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_vllm(node.module or "") and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_vllm(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                one.value
                for one in node.args
                if isinstance(one, ast.Constant) and isinstance(one.value, str) and _is_vllm(one.value)
            )


def _is_vllm(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def variables(folder: Path = ROOT / "trlpatch") -> dict[str, list[str]]:
    """The environment variables of vLLM's that trlpatch reads or sets, each with the files that do."""
    found: dict[str, list[str]] = {}
    for file, tree in _sources(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _VARIABLE.fullmatch(node.value):
                found.setdefault(node.value, []).append(file)
    return found


def missing(tree: Tree, seam: Seam) -> str | None:
    """Why a seam does not hold in these sources; None where it does, or where the release need not have it."""
    if not _concerns(tree, seam.releases):
        return None
    found = resolve(tree, seam.owner, seam.name)
    if found is None:
        return f"{seam}: not there"
    if not seam.first and not seam.keywords:
        return None
    if not isinstance(found.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"{seam}: expected a function"
    names, others = parameters(found.node)
    where = f"{found.module}:{found.node.lineno}"
    if tuple(names[: len(seam.first)]) != seam.first:
        return f"{seam}: expected the parameters {', '.join(seam.first)} first, found {', '.join(names)} ({where})"
    lacking = [] if others else [word for word in seam.keywords if word not in names]
    if lacking:
        return f"{seam}: takes no {', '.join(lacking)}, but {', '.join(names)} ({where})"
    return None


def by_keyword(tree: Tree, module: str, function: str, called: str) -> str | None:
    """Why vLLM's function does not pass all that it passes to a method of ours by keyword; None where it does."""
    found = tree.find(module, function)
    body = found.node if found is not None else None
    calls = [node for node in ast.walk(body or ast.Module([], [])) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).endswith(f".{called}")]
    if ours and not any(call.args for call in ours):
        return None
    said = ", ".join(map(ast.unparse, ours))
    return f"{module}.{function}: expected a call of {called} with keywords only, found {said}"


def resolve(tree: Tree, owner: str, name: str) -> Definition | None:
    """The definition of a name in a module or a class; None where either is not there."""
    if tree.parsed(owner) is not None:
        return tree.find(owner, name)
    module, _, kind = owner.rpartition(".")
    found = tree.find(module, kind)
    return found and tree.member(found, name)


def failures(tree: Tree) -> list[str]:
    """Everything that does not hold in the sources of one vLLM."""
    said = [missing(tree, seam) for seam in seams_of(MEMBERS)]
    said += [by_keyword(tree, *call) for call in BY_KEYWORD]
    for name, files in imported().items():
        module, _, last = name.rpartition(".")
        if name != PACKAGE and not _can_import(tree, module, last):
            said.append(f"{name}: cannot be imported ({', '.join(files)})")
    known = tree.read("vllm/envs.py") or ""
    said += [
        f"{name}: not in vllm/envs.py ({', '.join(files)})"
        for name, files in variables().items()
        if not re.search(rf"""["']{name}["']""", known) and _concerns(tree, VARIABLES.get(name, _EVERY))
    ]
    return [one for one in said if one is not None]


def _concerns(tree: Tree, releases: str) -> bool:
    return not tree.version or parse_release(tree.version) in ReleaseRange(releases)


def _can_import(tree: Tree, module: str, name: str) -> bool:
    whole = f"{module}.{name}"
    above = [known for known in IMPORTS if f"{whole}.".startswith(f"{known}.")]
    if above and not _concerns(tree, IMPORTS[max(above, key=len)]):
        return True
    return tree.find(module, name) is not None or tree.parsed(whole) is not None
