"""Import hook that runs patched files under TRL's own module names.

It claims exactly the modules it was given and answers None for every other, so other hooks work beside it. The module
keeps its name, package and parent; `__file__` and every code object name the patched file, so tracebacks, pdb,
coverage and `inspect.getsource` show the lines that run.
"""

from __future__ import annotations

import importlib.util
import io
import linecache
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from trlpatch.runtime.path_hook import PatchedPathHook

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.readers import FileReader

    from _typeshed import ReadableBuffer


class ModuleSource:
    """The text that runs as one module.

    Args:
        module: full name, such as `trl.trainer.grpo_trainer`.
        path: what `__file__` says. Its last part is upstream's: TRL up to 0.21 takes `exp_name` from it.
        text: verified text; or what returns it, and whether it is on disk, when it is first asked for.
        on_disk: the file exists at `path` and holds `text`.
        package: for a package, upstream's own `__init__.py`: `__file__` stays that, because submodules and data files
            are looked for beside it.
    """

    # A plain class for the reason that `trlpatch.outcomes` gives.
    def __init__(
        self,
        module: str,
        path: Path,
        text: str | Callable[[], tuple[str, bool]],
        on_disk: bool = True,
        package: Path | None = None,
    ) -> None:
        self.module = module
        self.path = path
        self.package = package
        self._content = (text, on_disk) if isinstance(text, str) else text

    @property
    def text(self) -> str:
        """The verified text."""
        return self._verified()[0]

    @property
    def on_disk(self) -> bool:
        """Whether the file exists at `path` and holds `text`."""
        return self._verified()[1]

    def _verified(self) -> tuple[str, bool]:
        if callable(self._content):
            self._content = self._content()
        return self._content


class PatchedLoader(SourceFileLoader):
    """Runs verified text from memory and uses the file beside it only for byte code.

    The text is verified before byte code of it is looked for, because `on_disk` is asked first.
    """

    def __init__(self, source: ModuleSource) -> None:
        super().__init__(source.module, str(source.path))
        self.source = source

    def get_data(self, path: str) -> bytes:
        """Return the verified text for the file itself, bytes from disk for byte code."""
        # The file may be gone by now (`trlpatch cache clear` in another process); the text was verified when read.
        if path == self.path:
            return self.source.text.encode()
        return super().get_data(path)

    def path_stats(self, path: str) -> Mapping[str, Any]:
        """Return the stats that byte code is kept with, a hash of the text in place of mtime.

        Byte code of another text with the same size and the same second of mtime would run otherwise.

        Raises:
            OSError: the file is not there.
        """
        text_hash = importlib.util.source_hash(self.get_data(self.path))
        return {**super().path_stats(path), "mtime": int.from_bytes(text_hash[:4], "little")}

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the module's code, compiled anew if the byte code beside the file cannot be read."""
        if self.source.on_disk:
            try:
                return super().get_code(fullname)
            except (EOFError, ValueError, TypeError, ImportError):
                pass  # Unreadable byte code (truncated, not marshal data): compile the text instead.
        return self.source_to_code(self.get_data(self.path), self.path)

    def set_data(self, path: str, data: ReadableBuffer, *, _mode: int = 0o600) -> None:
        """Write byte code beside the file, if there is one."""
        if self.source.on_disk:
            super().set_data(path, data, _mode=_mode)

    def get_resource_reader(self, name: str | None = None) -> FileReader:
        """Return a reader of the data files beside a package's own `__init__.py`.

        TRL 0.26 reads the template of its model cards with `importlib.resources.files("trl")`, at every checkpoint.
        """
        from importlib.readers import FileReader  # 2 ms that a warm start does not need

        package = self.source.package
        beside = self if package is None else SourceFileLoader(self.source.module, str(package))
        return FileReader(beside)

    def exec_module(self, module: ModuleType) -> None:
        """Run the text as `module`."""
        show_source(self.source)
        super().exec_module(module)


class PatchedFinder(MetaPathFinder):
    """Finds the modules of one session. Replaces its table instead of changing it: other threads may be importing."""

    def __init__(self) -> None:
        self._sources: Mapping[str, ModuleSource] = {}
        self._path_hook = PatchedPathHook(lambda: self._sources, spec_of)

    @property
    def sources(self) -> Mapping[str, ModuleSource]:
        """The claimed modules by name."""
        return self._sources

    def claim(self, sources: Mapping[str, ModuleSource]) -> None:
        """Claim these modules too, and be the first finder that is asked."""
        self._sources = {**self._sources, **sources}
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._path_hook.install(bool(self._sources))

    def restore(self, sources: Mapping[str, ModuleSource]) -> None:
        """Claim exactly these modules; without any, leave `sys.meta_path`."""
        self._sources = dict(sources)
        if not sources and self in sys.meta_path:
            sys.meta_path.remove(self)
        self._path_hook.install(bool(sources))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a claimed module, None for every other."""
        source = self._sources.get(fullname)
        return None if source is None else spec_of(source)


def spec_of(source: ModuleSource) -> ModuleSpec:
    """Return the import spec that runs `source`.

    Raises:
        ImportError: importlib makes no spec for its path.
    """
    if source.package is not None:
        own = ModuleSpec(source.module, PatchedLoader(source), origin=str(source.package), is_package=True)
        own.submodule_search_locations = [str(source.package.parent)]
        own.has_location = True
        return own
    spec = importlib.util.spec_from_file_location(source.module, source.path, loader=PatchedLoader(source))
    if spec is None:  # pragma: no cover - only without a loader
        raise ImportError(f"no import spec for {source.path}", name=source.module)
    return spec


def running_file(module: ModuleType) -> str | None:
    """Return the file whose text `module` runs."""
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    # Also of a loader that instruments ours and runs the same file (typeguard's).
    return loader.path if isinstance(loader, SourceFileLoader) else getattr(module, "__file__", None)


def show_source(source: ModuleSource) -> None:
    """Make tracebacks show the text of a source that is not on disk."""
    if not source.on_disk:
        # A modification time of None tells linecache.checkcache to keep the entry.
        lines = list(io.StringIO(source.text))
        linecache.cache[str(source.path)] = (len(source.text), None, lines, str(source.path))


def finish_import(name: str) -> bool:
    """Return whether `name` is imported, after waiting for another thread that is importing it."""
    if name not in sys.modules:
        return False
    spec = getattr(sys.modules[name], "__spec__", None)
    if getattr(spec, "_initializing", False):
        importlib.import_module(name)
    return name in sys.modules
