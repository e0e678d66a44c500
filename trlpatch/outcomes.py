"""Outcome model: what became of one patch on one target, as rewriter, cache manifest, report and command line have it.

Imports nothing of ours: a warm start reads outcomes from the cache and must import neither the rewriter nor libcst.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["applied", "skipped", "failed"]

MODULE = "<module>"
"""Stands for the module level, outside every class and function, where a qualified name is expected."""

FIELDS = ".<fields>"
"""Behind the name of a class: its list of annotated fields, where a qualified name is expected."""

OUTPUT_CHECK = "output check"
"""Stands for a patch's name where patched text failed a check."""

ENGINE_USE = "engine use"
"""Stands for a patch's name where the census found a use of an engine, or a lost name, that no patch knows."""

WHOLE_FILE = "every patch"
"""Stands for a patch's name where a file as a whole cannot be used."""


@dataclass(frozen=True)
class Drift:
    """Where upstream's text is not what a patch expects.

    Attributes:
        line: line of `qualname` in the upstream file, counted from 1.
        anchor: name of the anchor, or of the failed check.
        lookalike: the nearest line that looks like the anchor, as `<line>: <text>`, or empty.
    """

    file: str
    line: int
    qualname: str
    anchor: str
    expected: int
    found: int
    lookalike: str


@dataclass(frozen=True)
class Outcome:
    """What became of one patch on one target.

    Attributes:
        patch: name of the patch, OUTPUT_CHECK or WHOLE_FILE.
        reason: why it was skipped or failed; empty when applied.
        variant: the range of TRL releases whose shape matched; empty when none was tried.
        anchors: how often each anchor was found.
        drift: where it failed, if an anchor or an output check did.
    """

    target: str
    patch: str
    status: Status
    reason: str = ""
    variant: str = ""
    anchors: Mapping[str, int] = field(default_factory=dict)
    drift: Drift | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON-able values; `drift` only where there is one."""
        plain = {**vars(self), "anchors": dict(self.anchors)}
        drift = plain.pop("drift")
        return plain if drift is None else {**plain, "drift": dict(vars(drift))}
