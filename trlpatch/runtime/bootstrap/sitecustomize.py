"""sitecustomize of the processes under `trlpatch run`: patch TRL right before it is first imported.

Python imports this at its start, because this directory comes first on PYTHONPATH (trlpatch/runtime/children.py). It
imports nothing of trlpatch before that, so a process without TRL pays next to nothing; from Python 3.7 on.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, NoReturn


class PatchBeforeTrl:
    """Import hook that answers for `trl` alone, once: whoever asks gets a spec whose loader patches first.

    Asking (`importlib.util.find_spec`) patches nothing. Beside it stands a path hook for the directory of TRL's
    submodules: it is reached where a finder in front answers for `trl` through `PathFinder`, as typeguard's does.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the finders behind find for `trl`, with a loader that patches first."""
        if fullname != "trl":
            return None
        spec = self.found_elsewhere(path, target)
        if spec is not None and spec.loader is not None and spec.origin is not None:  # no namespace package
            spec.loader = PatchBeforeLoading(self, spec.loader)  # type: ignore[assignment]
        return spec

    def found_elsewhere(
        self, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of `trl` that the first other finder finds."""
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec("trl", path, target)
                if spec is not None:
                    return spec
        return None

    def path_hook(self, path: str) -> NoReturn:
        """Patch where the directory of TRL's submodules is looked at; leave the finding to other path hooks."""
        if path.replace("\\", "/").endswith("/trl") and "trl" in sys.modules:
            self.patch()
        raise ImportError("not for this path hook: " + path)

    def patch(self) -> None:
        """Patch, unless the process did so itself; stay in place where that fails, so that nothing runs stock."""
        root = __file__.replace("\\", "/").rsplit("/", 4)[0]
        try:
            try:
                from trlpatch.runtime.children import patch_child
            except ImportError:
                sys.path.append(root)  # the trlpatch of the parent, which may be run from a checkout
                try:
                    from trlpatch.runtime.children import patch_child
                finally:
                    sys.path.remove(root)
        except Exception as error:
            raise RuntimeError(
                "trlpatch run: this process imports trl and inherits TRLPATCH_CHILDREN, but trlpatch cannot be "
                "imported by " + sys.executable + ": " + str(error) + ". Install it there, or start the process "
                "without " + root + "/trlpatch/runtime/bootstrap on PYTHONPATH."
            ) from error
        patch_child()
        self.remove()

    def install(self) -> None:
        """Be asked first, and once."""
        sys.meta_path.insert(0, self)
        sys.path_hooks.insert(0, self.path_hook)

    def remove(self) -> None:
        """Leave the import system."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self.path_hook in sys.path_hooks:
            sys.path_hooks.remove(self.path_hook)


class PatchBeforeLoading:
    """Loader of `trl` that patches, then leaves the module to whom it belongs: a patch may be of `trl` itself."""

    def __init__(self, hook: PatchBeforeTrl, loader: Loader) -> None:
        self.hook = hook
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Patch while `trl` is not in sys.modules yet."""
        self.hook.patch()
        found = self.hook.found_elsewhere()
        spec.loader = self.loader if found is None or found.loader is None else found.loader
        return spec.loader.create_module(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def chain() -> None:
    """Run the sitecustomize that Python would have found without this one."""
    here = __file__.replace("\\", "/").rsplit("/", 1)[0]
    places = [entry.replace("\\", "/").rstrip("/") for entry in sys.path]
    if here not in places:
        return
    own = sys.modules.pop("sitecustomize")
    place = places.index(here)
    entry = sys.path.pop(place)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.path.insert(place, entry)  # some launchers hand sys.path on as PYTHONPATH
        sys.modules.setdefault("sitecustomize", own)


if __name__ == "sitecustomize":
    PatchBeforeTrl().install()
    chain()
