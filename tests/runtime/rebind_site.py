"""Modules that are imported from one text and moved to another, for the tests of rebinding."""

from __future__ import annotations

import importlib
import itertools
import textwrap
from pathlib import Path

from trlpatch.runtime.loader import ModuleSource
from trlpatch.runtime.rebind import ModuleSwap, prepare_swaps
from trlpatch.runtime.undo_journal import UndoJournal

NUMBERS = itertools.count()


class Site:
    """Modules that are imported from one text and moved to another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []

    def swap(self, before: str, after: str, *touched: str, on_disk: bool = True, package: str = "") -> ModuleSwap:
        name = f"rebound{next(NUMBERS)}"
        if package:
            (self.directory / package).mkdir(exist_ok=True)
            (self.directory / package / "__init__.py").touch()
            self.names.append(package)
            name = f"{package}.{name}"
        self.names.append(name)
        path = self.directory / Path(*name.split(".")).with_suffix(".py")
        path.write_text(textwrap.dedent(before), encoding="utf-8")
        patched = self.directory / "patched" / path.name
        patched.parent.mkdir(exist_ok=True)
        after = textwrap.dedent(after)
        if on_disk:
            patched.write_text(after, encoding="utf-8")
        importlib.import_module(name)
        return ModuleSwap(
            ModuleSource(name, path, path.read_text(encoding="utf-8"), on_disk=True),
            ModuleSource(name, patched, after, on_disk),
            touched,
        )


def commit(*swaps: ModuleSwap) -> UndoJournal:
    journal = UndoJournal()
    prepare_swaps(swaps).commit(journal)
    return journal
