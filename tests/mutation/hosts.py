"""Hosts: TRL's own source files, with locators for what a mutation changes and edits by span.

`ast` finds, text is spliced: what a kind does not name stays as TRL wrote it, comments and layout included. Where the
files lie is written here once more, and not read from trlpatch's target table, which is under test.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

from tests.golden.sources import pinned, unpacked, wheel_cache

RELEASES = ("0.18.2", "0.23.1", "0.26.2", "0.29.1", "1.9.2", "1.16.0")

ENGINES = ("llm", "vllm_engine")
SYNCS = ("sync_weights", "_move_model_to_vllm")

GRPO = "trl/trainer/grpo_trainer.py", "GRPOTrainer"
RLOO = "trl/trainer/rloo_trainer.py", "RLOOTrainer"
ONLINE_DPO = "trl/trainer/online_dpo_trainer.py", "OnlineDPOTrainer"
ONLINE_DPO_EXPERIMENTAL = "trl/experimental/online_dpo/online_dpo_trainer.py", "OnlineDPOTrainer"
GOLD = "trl/experimental/gold/gold_trainer.py", "GOLDTrainer"
OPENENV = "trl/experimental/openenv/utils.py", ""
GENERATION = "trl/generation/vllm_generation.py", "VLLMGeneration"
DISTILLATION = "trl/trainer/distillation_trainer.py", "DistillationTrainer"
IW_OPD = "trl/experimental/iw_opd/iw_opd_trainer.py", "IWOPDTrainer"

ROLLOUT_HOSTS = {
    "0.18.2": (GRPO, ONLINE_DPO),
    "0.23.1": (GRPO, RLOO, ONLINE_DPO),
    "0.26.2": (GRPO, RLOO, ONLINE_DPO_EXPERIMENTAL, GOLD, OPENENV),
    "0.29.1": (GENERATION, ONLINE_DPO_EXPERIMENTAL, GOLD, OPENENV),
    "1.9.2": (GENERATION, ONLINE_DPO_EXPERIMENTAL),
    "1.16.0": (GENERATION, ONLINE_DPO_EXPERIMENTAL),
}
"""Files that roll out on the engine themselves."""

STANDING_ON_GENERATION = {
    "0.29.1": (GRPO, RLOO),
    "1.9.2": (GRPO, GOLD),
    "1.16.0": (GRPO, RLOO, GOLD, DISTILLATION, IW_OPD),
}
"""Trainers whose rollouts run in `VLLMGeneration`."""


@cache
def tree_of(release: str) -> Path:
    """Return the directory that holds the release's `trl` package."""
    return unpacked(pinned()[release], wheel_cache())


@cache
def read(release: str, path: str) -> str:
    return (tree_of(release) / path).read_text(encoding="utf-8")


@lru_cache(maxsize=8)
def parsed(text: str) -> ast.Module:
    """Return the syntax tree of a text; it is shared, so nobody may change it."""
    return ast.parse(text)


@dataclass(frozen=True)
class Host:
    """One TRL file; `cls` is empty where it holds functions that take the trainer."""

    release: str
    path: str
    cls: str
    text: str

    @property
    def name(self) -> str:
        return Path(self.path).stem.removesuffix("_trainer") if self.cls else "openenv"

    @cached_property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self.text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    def offset(self, line: int, column: int) -> int:
        start = self._starts[line - 1]
        text = self.text[start : self._starts[line]]
        return start + (column if text.isascii() else len(text.encode()[:column].decode()))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def segment(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def lines(self, node: ast.stmt) -> tuple[int, int]:
        """Return the span of a statement's whole lines, decorators included."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        return self._starts[first - 1], self._starts[node.end_lineno or node.lineno]

    def edit(self, *edits: tuple[tuple[int, int], str]) -> str:
        """Return the text with every (span, replacement) applied."""
        text = self.text
        for (start, end), new in sorted(edits, key=lambda edit: edit[0], reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def replace(self, node: ast.expr | ast.stmt, new: str) -> str:
        return self.edit((self.span(node), new))

    def before(self, statement: ast.stmt, code: str) -> str:
        start, _ = self.lines(statement)
        return self.edit(((start, start), indented(code, statement.col_offset)))

    def after(self, statement: ast.stmt, code: str) -> str:
        _, end = self.lines(statement)
        return self.edit(((end, end), indented(code, statement.col_offset)))

    # What is there.

    @cached_property
    def class_node(self) -> ast.ClassDef | None:
        return next((n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name == self.cls), None)

    def method(self, name: str) -> ast.FunctionDef | None:
        body = self.class_node.body if self.class_node else self.tree.body
        return next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)

    def engine_calls(self, *methods: str) -> list[ast.Call]:
        """Return the calls `<owner>.llm.<method>(...)`, in the order of the text."""
        found = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and _engine_method(n) in methods]
        return sorted(found, key=lambda n: n.lineno)

    @cached_property
    def rollouts(self) -> list[ast.Call]:
        return self.engine_calls("generate", "chat")

    @cached_property
    def sync(self) -> ast.FunctionDef | None:
        return next((m for name in SYNCS if (m := self.method(name))), None)

    @cached_property
    def pushes(self) -> list[ast.Call]:
        calls = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        return sorted((n for n in calls if n.func.attr == "load_weights"), key=lambda n: n.lineno)  # type: ignore[attr-defined]

    @cached_property
    def build(self) -> ast.Call | None:
        calls = (n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
        return next((n for n in calls if n.func.id == "LLM"), None)  # type: ignore[attr-defined]

    @cached_property
    def engine(self) -> str:
        """The engine as this file spells it: `self.llm`, `trainer.vllm_generation.llm`."""
        if self.rollouts:
            return ast.unparse(self.rollouts[0].func.value)  # type: ignore[attr-defined]
        return "self.vllm_generation.llm"

    @property
    def owner(self) -> str:
        return self.engine.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        return self.engine.rpartition(".")[2]

    @property
    def receiver(self) -> str:
        """The first parameter of what this file's engine hangs on: `self` or `trainer`."""
        return self.engine.partition(".")[0]

    def statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def function(self, node: ast.AST) -> ast.FunctionDef:
        while not isinstance(node, ast.FunctionDef):
            node = self.parents[node]
        return node

    def body(self, function: ast.FunctionDef) -> list[ast.stmt]:
        """The statements after the docstring."""
        return function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body

    # What is added.

    def with_method(self, code: str) -> str:
        """Return the text with a method at the end of the class, or a function at the end of a file of functions."""
        if self.class_node is None:
            return self.with_function(code)
        last = self.class_node.body[-1]
        _, end = self.lines(last)
        return self.edit(((end, end), "\n" + indented(code, last.col_offset)))

    def with_function(self, code: str) -> str:
        """Return the text with code at the end of the module."""
        return f"{self.text.rstrip()}\n\n\n{indented(code, 0)}"

    def with_import(self, line: str) -> str:
        """Return the text with an import before the first one of the module."""
        first = next(n for n in self.tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and not _future(n))
        return self.before(first, line)


def _future(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _engine_method(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Attribute):
        return function.attr if function.value.attr in ENGINES else ""
    return ""


def indented(code: str, columns: int) -> str:
    """Return code with its own margin removed and another one put in its place."""
    return textwrap.indent(textwrap.dedent(code).strip("\n") + "\n", " " * columns)


@cache
def host(release: str, path: str, cls: str) -> Host:
    return Host(release, path, cls, read(release, path))


def rollout_hosts(release: str) -> Iterator[Host]:
    yield from (host(release, *where) for where in ROLLOUT_HOSTS[release])


def standing_hosts(release: str) -> Iterator[Host]:
    yield from (host(release, *where) for where in STANDING_ON_GENERATION.get(release, ()))


def config_hosts(release: str) -> Iterator[Host]:
    """Yield the config dataclasses of the release's trainers."""
    for path, cls in (*ROLLOUT_HOSTS[release], *STANDING_ON_GENERATION.get(release, ())):
        config = path.replace("_trainer.py", "_config.py")
        if cls.endswith("Trainer") and (tree_of(release) / config).is_file():
            yield host(release, config, cls.removesuffix("Trainer") + "Config")
