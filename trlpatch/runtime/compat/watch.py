"""Import watch: tells when a module of TRL, or one of transformers with classes of interest, has been executed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OF_TRANSFORMERS = (
    "transformers.training_args",
    "transformers.trainer",
    "transformers.tokenization_utils_base",
    "transformers.tokenization_mistral_common",
)
"""TrainingArguments, Trainer and the tokenizers, in the order in which their classes build on each other."""

BASES = OF_TRANSFORMERS[:2]
"""Of which every config and trainer is made."""


class Watch(MetaPathFinder):
    """Stands before all finders, finds what they find, and calls `imported` with the name after the module has run.

    Args:
        imported: called with the name of a module.
        everything: all modules of interest; else BASES alone.
    """

    def __init__(self, imported: Callable[[str], None], *, everything: bool) -> None:
        self._imported = imported
        self._everything = everything

    def start(self) -> None:
        """Watch from now on, and tell of what is imported already."""
        sys.meta_path.insert(0, self)
        of_trl = sorted(filter(_of_trl, list(sys.modules))) if self._everything else ()
        for name in (*OF_TRANSFORMERS, *of_trl):
            if name in sys.modules and self._watches(name):
                self._imported(name)

    def stop(self) -> None:
        """Watch no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the finders behind this one find, with a loader that tells when it is done."""
        if not self._watches(fullname):
            return None
        for finder in list(sys.meta_path):
            # As the import system: a finder of before Python 3.4 is passed over.
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._tell_after(spec)
                return spec
        return None

    def _watches(self, name: str) -> bool:
        return name in BASES or (self._everything and (_of_trl(name) or name in OF_TRANSFORMERS))

    def _tell_after(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        # A loader of this module alone: others (zipimport's) serve many.
        if loader is None or getattr(loader, "name", None) != spec.name or not hasattr(loader, "__dict__"):
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            if self in sys.meta_path:
                self._imported(spec.name)

        # On the instance, so that its class stays what others look for (inspect, pkgutil, resources).
        vars(loader)["exec_module"] = exec_module


def _of_trl(name: str) -> bool:
    return name.startswith("trl.")
