"""In-place module swap: turn a module that is already imported into what another text of it says.

Classes and functions keep their identity: every holder of `GRPOTrainer`, every subclass and every bound method sees
the new code, because `__code__` of the same function objects is exchanged. Works in both directions, so the same code
patches a module that was imported too early and returns a patched one to upstream's text.

All is prepared and checked before anything changes; what a commit changed is journalled and can be undone exactly.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from trlpatch.errors import PatchError
from trlpatch.outcomes import FIELDS, MODULE
from trlpatch.runtime.configs import (
    field_assignments,
    inheriting_assignments,
    is_exchangeable,
    new_fields,
    out_of_reach,
)
from trlpatch.runtime.live_objects import functions, overriding
from trlpatch.runtime.loader import ModuleSource, show_source, spec_of
from trlpatch.runtime.undo_journal import ABSENT, Assignment, UndoJournal
from trlpatch.source.syntax import imported_names, loaded_names, stored_names

_SHAPE_FLAGS = 0x20 | 0x80 | 0x100 | 0x200 | 0x04 | 0x08
"""Generator, coroutine, iterable coroutine, asynchronous generator, *args, **kwargs (`inspect.CO_*`)."""


@dataclass(frozen=True)
class ModuleSwap:
    """A module to take from one text to another.

    Attributes:
        before: the text it was executed from.
        touched: qualified names of the functions, `Class.<fields>` for field lists and `<module>` for the module
            level, that differ.
        spec: import spec afterwards; None makes one that runs `after`.
        back: `after` is TRL's own text. Only messages depend on it.
    """

    before: ModuleSource
    after: ModuleSource
    touched: tuple[str, ...]
    spec: Any = None
    back: bool = False

    def refusal(self, name: str, facts: str) -> PatchError:
        """Return, not raise, the error that `name` of this module cannot be exchanged."""
        what = "returned to TRL's own code" if self.back else "patched after its import"
        advice = (
            "Continue in a new process."
            if self.back
            else "Call trlpatch.PatchFastRL() before this module is imported."
        )
        return PatchError(f"{self.after.module}.{name} cannot be {what}: {facts}. {advice}")

    @property
    def module(self) -> ModuleType:
        """The live module."""
        return sys.modules[self.after.module]


@dataclass(frozen=True)
class PreparedSwaps:
    """Everything that a commit will assign, and what the swaps cannot reach."""

    swaps: tuple[ModuleSwap, ...]
    assignments: tuple[Assignment, ...]
    unfixable: tuple[str, ...]

    def commit(self, journal: UndoJournal) -> None:
        """Assign it all, or nothing if something raises.

        Raises:
            Exception: what an assignment raised, after those before it were undone.
        """
        journal.make(self.assignments)
        for swap in self.swaps:
            show_source(swap.after)


def prepare_swaps(swaps: Sequence[ModuleSwap]) -> PreparedSwaps:
    """Work out the assignments for all `swaps` without changing a live object.

    Raises:
        PatchError: a live class or function is not the one that `before` describes, or cannot take the new code.
        ImportError: an import that a patch put at module level cannot run.
    """
    assignments: list[Assignment] = []
    unfixable: list[str] = []
    scratches: dict[type, type] = {}
    for swap in swaps:
        one = _Swap(swap)
        assignments += one.function_assignments()
        scratches |= one.scratch_classes()
        assignments += one.module_assignments()
        unfixable += one.overrides()
    for live, scratch in scratches.items():
        unfixable += out_of_reach(live, new_fields(live, scratch)) if new_fields(live, scratch) else []
        assignments += field_assignments(live, scratch)
    assignments += inheriting_assignments(scratches)
    return PreparedSwaps(tuple(swaps), tuple(assignments), tuple(unfixable))


def touched_classes(module: ModuleType, touched: Iterable[str]) -> Iterator[tuple[type, tuple[str, ...]]]:
    """Yield the live classes of `module` whose methods are in `touched`, with the names of those methods."""
    methods: dict[str, list[str]] = {}
    for qualname in touched:
        owner, _, name = qualname.rpartition(".")
        if owner and not qualname.endswith(FIELDS):
            methods.setdefault(owner, []).append(name)
    for owner, names in methods.items():
        if isinstance(cls := vars(module).get(owner), type):
            yield cls, tuple(names)


class _Swap:
    def __init__(self, swap: ModuleSwap) -> None:
        self.swap = swap
        self.module = swap.module
        self.old = _Codes(swap.before)
        self.new = _Codes(swap.after)
        self.functions = [name for name in swap.touched if not name.endswith(FIELDS) and name != MODULE]
        self.configs = [name.removesuffix(FIELDS) for name in swap.touched if name.endswith(FIELDS)]

    def function_assignments(self) -> Iterator[Assignment]:
        for qualname in self.functions:
            found = list(self._live(qualname))
            if not found:
                raise self._missing(qualname)
            for function in found:
                code = self._counterpart(qualname, function)
                self._check_swap(qualname, function.__code__, code)
                yield Assignment(function, "__code__", code)

    def module_assignments(self) -> Iterator[Assignment]:
        yield from self._bindings()
        spec = self.swap.spec or spec_of(self.swap.after)
        yield Assignment(self.module, "__spec__", spec)
        yield Assignment(self.module, "__loader__", spec.loader)
        yield Assignment(self.module, "__file__", spec.origin)
        yield Assignment(self.module, "__cached__", spec.cached)
        if sys.version_info >= (3, 13):
            # inspect.getsource of a class reads its line here instead of searching the file.
            for qualname, lines in self.new.class_lines.items():
                cls = vars(self.module).get(qualname)
                if isinstance(cls, type) and cls.__module__ == self.module.__name__ and len(lines) == 1:
                    yield Assignment(cls, "__firstlineno__", lines[0])

    def _bindings(self) -> Iterator[Assignment]:
        """Run the imports and assignments at module level that differ, and the assignments that use their results.

        Those under `if is_vllm_available():` bind what they bound when the module was imported: it could be imported.
        """
        old, new = self.old.bindings(), self.new.bindings()
        namespace = {**vars(self.module), "__name__": self.module.__name__, "__package__": self.module.__package__}
        gone = {name for text in old.keys() - new.keys() for name in _bound(old[text])}
        changed: set[str] = set()
        for text, statement in new.items():
            if text in old and not changed & loaded_names(statement):
                continue
            try:
                exec(compile(statement, str(self.swap.after.path), "exec"), namespace)
            except ImportError:
                if not self.swap.back:
                    raise
                gone -= _bound(statement)  # what a repair put there stays: TRL's own statement cannot run here
                continue
            changed |= _bound(statement)
        yield from (Assignment(self.module, name, namespace[name]) for name in sorted(changed))
        yield from (Assignment(self.module, name, ABSENT) for name in sorted(gone - changed))

    def scratch_classes(self) -> Mapping[type, type]:
        """Execute the new text beside the live module and return its config classes by their live counterparts."""
        if not self.configs:
            return {}
        namespace: dict[str, Any] = {
            name: vars(self.module)[name] for name in ("__name__", "__package__", "__spec__", "__loader__", "__doc__")
        }
        namespace["__file__"] = str(self.swap.after.path)
        exec(self.new.code, namespace)
        result = {}
        for name in self.configs:
            live = self._class(name)
            if not is_exchangeable(live):
                raise self.swap.refusal(name, "expected a dataclass without __slots__")
            result[live] = namespace[name]
        return result

    def overrides(self) -> list[str]:
        return [
            line
            for cls, methods in touched_classes(self.module, self.swap.touched)
            for line in overriding(cls, methods)
        ]

    def _live(self, qualname: str) -> Iterator[FunctionType]:
        owner, _, name = qualname.rpartition(".")
        holder = vars(self._class(owner)) if owner else vars(self.module)
        if name not in holder:
            return
        files = {str(self.swap.before.path), getattr(self.module, "__file__", None)}
        for function in functions(holder[name]):
            code = function.__code__
            if code.co_qualname == qualname and code.co_filename in files:
                yield function

    def _class(self, name: str) -> type:
        found = vars(self.module).get(name)
        if not isinstance(found, type):
            raise self.swap.refusal(
                name,
                f"expected TRL's class, found {found!r}; the import of this module is unfinished, or something "
                "replaced the class",
            )
        if (found.__module__, found.__qualname__) != (self.module.__name__, name):
            raise self.swap.refusal(
                name,
                f"expected TRL's own class, found {found.__module__}.{found.__qualname__}, which another library put "
                "in its place",
            )
        return found

    def _counterpart(self, qualname: str, function: FunctionType) -> CodeType:
        old, new = self.old.functions.get(qualname, []), self.new.functions.get(qualname, [])
        if len(old) == len(new) == 1:
            return new[0]
        # The same name several times (a property's getter and setter, definitions under if and else): by position.
        lines = [code.co_firstlineno for code in old]
        if len(old) != len(new) or function.__code__.co_firstlineno not in lines:
            raise self.swap.refusal(
                qualname,
                f"expected one definition, found {len(old)} in {self.swap.before.path} and {len(new)} in "
                f"{self.swap.after.path}",
            )
        return new[lines.index(function.__code__.co_firstlineno)]

    def _missing(self, qualname: str) -> PatchError:
        owner, _, name = qualname.rpartition(".")
        holder = vars(self._class(owner)) if owner else vars(self.module)
        return self.swap.refusal(
            qualname,
            f"expected the function of {self.swap.before.path}, found {holder.get(name)!r}; something replaced it, or "
            "that file changed since it was imported",
        )

    def _check_swap(self, qualname: str, old: CodeType, new: CodeType) -> None:
        for fact, expected in _shape(old).items():
            found = _shape(new)[fact]
            if found != expected:
                raise self.swap.refusal(qualname, f"expected {fact} {expected!r}, the new text has {found!r}")


class _Codes:
    """The code objects of a text by qualified name, in source order; function bodies are not searched."""

    def __init__(self, executable: ModuleSource) -> None:
        self.text = executable.text
        self.code = compile(executable.text, str(executable.path), "exec", dont_inherit=True)
        self.functions: dict[str, list[CodeType]] = {}
        self.class_lines: dict[str, list[int]] = {}
        self._collect(self.code)

    def _collect(self, holder: CodeType) -> None:
        for code in holder.co_consts:
            if not isinstance(code, CodeType):
                continue
            if code.co_flags & 0x02:  # CO_NEWLOCALS: a function; class bodies lack it
                self.functions.setdefault(code.co_qualname, []).append(code)
            else:
                self.class_lines.setdefault(code.co_qualname, []).append(code.co_firstlineno)
                self._collect(code)

    def bindings(self) -> dict[str, ast.Module]:
        """Return the imports and assignments directly at module level, by their text, in their order."""
        tree = ast.parse(self.text)
        found = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)]
        return {ast.unparse(node): ast.Module([node], []) for node in found}


def _bound(tree: ast.Module) -> set[str]:
    return imported_names(tree.body[0]) | stored_names(tree)


def _shape(code: CodeType) -> dict[str, Any]:
    count = code.co_argcount + code.co_kwonlyargcount
    return {
        "free variables": code.co_freevars,
        "parameters": (code.co_posonlyargcount, code.co_kwonlyargcount, code.co_varnames[:count]),
        "kind": code.co_flags & _SHAPE_FLAGS,
    }
