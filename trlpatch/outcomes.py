"""Outcome model: what became of one patch on one target, as rewriter, cache manifest, report and command line have it.

Imports nothing of ours: a warm start reads outcomes from the cache and must import neither the rewriter nor libcst.
Records on its way are NamedTuples or plain classes: generating a dataclass takes 0.5 ms and a NamedTuple 0.07, and
fifteen dataclasses were a quarter of a warm start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

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


class Drift(NamedTuple):
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


class Outcome(NamedTuple):
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
    anchors: Mapping[str, int] = {}
    drift: Drift | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON-able values; `drift` only where there is one."""
        plain = {**self._asdict(), "anchors": dict(self.anchors)}
        if self.drift is None:
            del plain["drift"]
        else:
            plain["drift"] = self.drift._asdict()
        return plain
