"""Path hook that finds patched modules for whoever asks `PathFinder` instead of all of `sys.meta_path`.

Import hooks that instrument a package (typeguard, jaxtyping, pytest's assertion rewriting) put a finder in front of
ours and take from `PathFinder` the file to instrument. With this hook that file is the patched one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    from _typeshed.importlib import PathEntryFinderProtocol


class PatchedSource(Protocol):
    """What a patched module is found by: the `__init__.py` of a package, None for a plain module."""

    @property
    def package(self) -> Path | None:
        """Where TRL has it."""


Source = TypeVar("Source", bound=PatchedSource)


class PatchedPathHook(Generic[Source]):
    """Entry of `sys.path_hooks` for the directories of patched modules.

    It leaves the directory to the next hook and asks first, so that hooks which replace the file finder (beartype's)
    keep every other module.
    """

    def __init__(self, sources: Callable[[], Mapping[str, Source]], spec_of: Callable[[Source], ModuleSpec]) -> None:
        self._sources = sources
        self._spec_of = spec_of
        # beartype.claw (0.23) names the hooks it finds, and fails at one without a name.
        self.__name__ = self.__qualname__ = type(self).__name__

    def install(self, installed: bool) -> None:
        """Enter or leave `sys.path_hooks`; either way directories that were looked at before are looked at anew."""
        if installed and self not in sys.path_hooks:
            sys.path_hooks.insert(0, self)
        elif not installed and self in sys.path_hooks:
            sys.path_hooks.remove(self)
        for directory in [entry for entry in sys.path_importer_cache if self._holds(entry)]:
            sys.path_importer_cache.pop(directory, None)

    def __call__(self, path: str) -> PathEntryFinderProtocol:
        """Return the finder of the next path hook for a directory of patched modules, with them put in.

        Raises:
            ImportError: none of them is there.
        """
        if self._holds(path):
            for hook in [hook for hook in sys.path_hooks if hook is not self]:
                try:
                    return self._with_patched(hook(path))
                except ImportError:
                    continue
        raise ImportError(f"no patched module in {path}", path=path)

    def _holds(self, path: str) -> bool:
        slashes = path.replace(os.sep, "/").rstrip("/")
        for name, source in self._sources().items():
            if source.package is not None and slashes == source.package.parent.parent.as_posix():
                return True
            if slashes.endswith(f"/{name.rpartition('.')[0].replace('.', '/')}"):
                return True
        return False

    def _with_patched(self, finder: PathEntryFinderProtocol) -> PathEntryFinderProtocol:
        # The finder stays of its class: pkgutil.iter_modules chooses by it.
        find = finder.find_spec

        def find_spec(fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
            source = self._sources().get(fullname)
            return find(fullname, target) if source is None else self._spec_of(source)

        finder.find_spec = find_spec  # type: ignore[method-assign]
        return finder
