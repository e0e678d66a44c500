"""Arguments that TRL and transformers took away: accepted with `PatchFastRL(compat="on")`, explained without it.

The classes of TRL and transformers are changed when their modules are imported, or at once where they are already, and
get back what they had when TRL is returned to its own code. To explain, `TrainingArguments` and `Trainer` are enough.
Nothing here imports TRL or transformers, and importing this imports nothing: the rest is imported with their modules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from trlpatch.log import translations

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from trlpatch.options import Compat
    from trlpatch.runtime.compat.watch import Watch

_in_force: Compat | None = None
_watch: Watch | None = None


def install(compat: Compat) -> None:
    """Accept (compat="on") or explain ("off") the arguments in TABLE from now on; nothing if it is so already."""
    global _in_force, _watch
    if compat == _in_force:
        return
    remove()
    from trlpatch.runtime.compat.watch import Watch

    _in_force, _watch = compat, Watch(_change, everything=compat == "on")
    try:
        _watch.start()
    except BaseException:
        remove()
        raise


def remove() -> None:
    """Return every class to what it was. Does nothing if nothing is in force."""
    global _in_force, _watch
    if _watch is not None:
        _watch.stop()
    for name in ("classes", "explained"):
        if f"{__name__}.{name}" in sys.modules:
            import_module(f"{__name__}.{name}").undo()
    _in_force = _watch = None


@contextmanager
def undone() -> Iterator[None]:
    """Have the classes as TRL and transformers wrote them from here on; if the block raises, as they were before."""
    before = _in_force
    remove()
    try:
        yield
    except BaseException:
        if before is not None:
            install(before)
        raise


def describe() -> list[str]:
    """Describe what compat="on" does in this process, a line each; nothing where it is off."""
    if _in_force != "on":
        return []
    lines = ["on: arguments that this TRL and transformers took away are accepted (docs/compat.md)"]
    return lines + translations()


def _change(module: str) -> None:
    import_module(f"{__name__}.{'classes' if _in_force == 'on' else 'explained'}").change(module)
