"""Undo journal: attribute assignments that are prepared first, made together and undone exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
"""As a value: the attribute shall not be there."""


@dataclass(frozen=True)
class Assignment:
    """Set `owner.name` to `value`, or delete it when `value` is ABSENT."""

    owner: Any
    name: str
    value: Any

    def current(self) -> Any:
        """Return what the owner itself holds now, not what it inherits."""
        if self.name in ("__code__", "__annotations__"):
            return getattr(self.owner, self.name)
        return vars(self.owner).get(self.name, ABSENT)

    def make(self) -> None:
        """Do it. Deleting what is not there is no error."""
        if self.value is not ABSENT:
            setattr(self.owner, self.name, self.value)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


@dataclass
class UndoJournal:
    """The assignments that were made, with what to put back.

    Attributes:
        keep_foreign: what others have assigned since stays.
        undone: set by whoever put all of it back, for wrappers that others have wrapped and that therefore stay.
    """

    keep_foreign: bool = False
    undone: bool = False
    _back: list[tuple[Assignment, Any]] = field(default_factory=list)

    def make(self, assignments: Iterable[Assignment]) -> None:
        """Make all of them, or none if one raises.

        Raises:
            Exception: what an assignment raised, after those before it were undone.
        """
        start = len(self._back)
        try:
            for assignment in assignments:
                before = Assignment(assignment.owner, assignment.name, assignment.current())
                assignment.make()
                self._back.append((before, assignment.value))
        except BaseException:
            self.undo(start)
            raise

    def undo(self, start: int = 0) -> None:
        """Put back what was there, last first."""
        while len(self._back) > start:
            before, made = self._back.pop()
            if not self.keep_foreign or before.current() is made:
                before.make()
