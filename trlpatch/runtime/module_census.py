"""Census of TRL's modules that are no targets, computed once per TRL and remembered by the index of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trlpatch.outcomes import Drift, Outcome
from trlpatch.runtime.cache import RULES, Cache, debug
from trlpatch.runtime.index import Index, Stamp, stamp
from trlpatch.source.locate import TrlInstall

_PACKAGE = Path(__file__).resolve().parent.parent


def module_census(install: TrlInstall) -> tuple[Outcome, ...]:
    """Return the uses of an engine that no patch knows in modules of this TRL; they are read only after a change."""
    question = ("modules", str(install.root), install.version)
    known, index = _stamp(install), Index(Cache())
    answer = index.recall(question, known)
    remembered = None if answer is None else _outcomes(answer)
    if remembered is not None:
        return remembered
    from trlpatch.rewrite.census.findings import in_modules

    found = tuple(in_modules(install))
    index.record(question, known, [outcome.to_dict() for outcome in found])
    return found


def _stamp(install: TrlInstall) -> Stamp:
    """Return the stats of TRL's files and of the rules by which they are judged."""
    rules = [_PACKAGE / name for name in RULES]
    trees = [install.root, *(rule for rule in rules if not rule.suffix)]
    try:
        return stamp(files=[rule for rule in rules if rule.suffix], trees=trees)
    except OSError as error:
        debug("TRL's modules are read without the index: %s", error)
        return Stamp("", settled=False)


def _outcomes(answer: Any) -> tuple[Outcome, ...] | None:
    try:
        return tuple(Outcome(**{**one, "drift": Drift(**one["drift"])}) for one in answer)
    except (KeyError, TypeError):  # not what this version records
        return None
