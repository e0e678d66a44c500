"""Stock trainers beside an attached engine: said when their module is imported, or is there already, unpatched.

Nothing of trlpatch runs in a stock trainer, so this is the last place where a forgotten call can be noticed, or one
for another trainer: the engine would keep its share of the device, and transformers would generate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from trlpatch.errors import TrlpatchError
from trlpatch.log import warn_once
from trlpatch.options import DISABLE, in_force, read_switch
from trlpatch.source.locate import find_trl
from trlpatch.source.targets import TARGETS

_MODULES = {
    location.qualified: target
    for target in TARGETS.values()
    if target.kind == "trainer"
    for location in target.locations
}
"""The modules of trainers that roll out on vLLM, in any release, with the target each is for."""

_HOOKS = "_trlpatch"
"""The name under which patched modules hold the hooks."""


def watch() -> None:
    """Say it now if such a module is imported and stock, else when one is imported; once."""
    if read_switch(DISABLE):
        return
    imported = [name for name in _MODULES if name in sys.modules and _is_stock(name)]
    if imported:
        _say(imported[0])
    elif _watch not in sys.meta_path:
        # Behind the finder of trlpatch, so that what gets here is not patched; one that comes later stands before it.
        behind = [place for place, finder in enumerate(sys.meta_path) if finder is PathFinder]
        sys.meta_path.insert(behind[0] if in_force() and behind else 0, _watch)


class _Watch(MetaPathFinder):
    """Finds nothing. A patched module is found by the finder of trlpatch, which stands before it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _MODULES and _would_use_an_engine(fullname):
            sys.meta_path.remove(self)
            _say(fullname)
        return None


_watch = _Watch()


def _is_stock(module: str) -> bool:
    return not hasattr(sys.modules[module], _HOOKS) and _would_use_an_engine(module)


def _would_use_an_engine(module: str) -> bool:
    """Tell whether patches would have this trainer use an engine: not where TRL kept its old file as a signpost.

    Where nothing is patched, any of them is worth saying so.
    """
    if not in_force():
        return True
    try:
        location = _MODULES[module].location(find_trl().release)
    except TrlpatchError:
        return False
    return location is not None and location.qualified == module


def _say(module: str) -> None:
    name = _MODULES[module].classes[0]
    state = "does not patch it here" if in_force() else "is not in force here"
    warn_once(
        _watch,
        f"a model of this process carries an engine, but {module} is imported as TRL wrote it, and PatchFastRL() "
        f"{state}: a stock {name} does not use that engine. Call trlpatch.PatchFastRL() before "
        f"building trainers (in each process that trains), or set {DISABLE}=1 if stock is what you want.",
    )
