"""Log a thing once: every fallback is logged with its reason, but not on every training step."""

from __future__ import annotations

import logging
import weakref

logger = logging.getLogger("trlpatch")

_said: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()
_said_to_nobody: set[str] = set()


def log_once(about: object, message: str, *, level: int = logging.INFO) -> bool:
    """Log `message` the first time it concerns `about` (a trainer, an engine); True when logged."""
    try:
        said = _said.setdefault(about, set())
    except TypeError:  # not weakly referable or not hashable: say it once per process
        said = _said_to_nobody
    if message in said:
        return False
    said.add(message)
    logger.log(level, message)
    return True


def warn_once(about: object, message: str) -> bool:
    """Like `log_once`, as a warning."""
    return log_once(about, message, level=logging.WARNING)


_translated: dict[str, None] = {}


def tell_translation(message: str) -> None:
    """Warn once of what compat="on" did, and keep it for the report."""
    if message not in _translated:
        _translated[message] = None
        logger.warning(message)


def translations() -> list[str]:
    """Return what compat="on" did in this process, a line each, in the order in which it was met."""
    return list(_translated)


def forget_translations() -> None:
    """Say it again when it is met again."""
    _translated.clear()
