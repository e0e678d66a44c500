"""What is said about arguments that are gone: a note on upstream's error, a warning once for what was translated."""

from __future__ import annotations

from collections.abc import Iterable

from trlpatch.log import tell_translation
from trlpatch.runtime.compat.removed import Removed


def say(where: str, one: Removed, what: str) -> None:
    """Log once that the argument `one` of `where` was taken, what was done, and what to write."""
    tell_translation(f"{where}({one.name}=...): {what}. Gone since {one.since}; write {one.instead}")


def explain(error: TypeError, where: str, met: Iterable[Removed], accepted: bool) -> None:
    """Note on upstream's own error what took the names away, and what to write."""
    for one in met:
        note = f"{where}({one.name}=...): gone since {one.since}; write {one.instead}"
        if one.action != "explain" and not accepted:
            note += ', or call trlpatch.PatchFastRL(compat="on"), which accepts it'
        error.add_note(note)
