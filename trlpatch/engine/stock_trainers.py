"""Stock trainers beside an attached engine: said when their module is imported and `PatchFastRL()` is not in force.

Nothing of trlpatch runs in a stock trainer, so this is the last place where a forgotten call can be noticed: the
engine would keep its share of the device, and transformers would generate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from trlpatch.log import warn_once
from trlpatch.options import DISABLE, in_force, read_switch
from trlpatch.source.targets import TARGETS

_MODULES = {
    location.qualified: target.classes[0]
    for target in TARGETS.values()
    if target.kind == "trainer"
    for location in target.locations
}
"""The modules of trainers that roll out on vLLM, in any release, with the class each is for."""


def watch() -> None:
    """Say it now if such a module is imported already, else when one is; once."""
    if in_force() or read_switch(DISABLE):
        return
    imported = [name for name in _MODULES if name in sys.modules]
    if imported:
        _say(imported[0])
    elif _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)


class _Watch(MetaPathFinder):
    """Finds nothing. A patched module is found by the finder of trlpatch, which stands before it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _MODULES and not in_force():
            sys.meta_path.remove(self)
            _say(fullname)
        return None


_watch = _Watch()


def _say(module: str) -> None:
    warn_once(
        _watch,
        f"a model of this process carries an engine, but {module} is imported as TRL wrote it, and PatchFastRL() is "
        f"not in force here: a stock {_MODULES[module]} does not use that engine. Call trlpatch.PatchFastRL() before "
        f"building trainers (in each process that trains), or set {DISABLE}=1 if stock is what you want.",
    )
