"""Say a thing once: every fallback is logged with its reason, but not on every training step."""

from __future__ import annotations

import logging
import weakref
from typing import Any

logger = logging.getLogger("trlpatch")

_said: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
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
