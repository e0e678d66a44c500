"""Views of a patch report: the summary that `print` and a notebook show, and the full report.

Imported when a report is printed, so that a warm start does not pay for it. rich is imported by `__rich__` alone: it
draws a random number when it is imported, and `print(PatchFastRL())` leaves the caller's random state as it is.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trlpatch.outcomes import Outcome
from trlpatch.source.targets import TARGETS

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

WIDTH = 80
"""Columns of a summary."""

_NAME = 10
_FAILURES = 3
_REASON = 150
_SKIP = 80
_STYLES = {"applied": "green", "skipped": "bright_black", "failed": "red"}


class Summary:
    """What was patched, grouped, and what this process holds now: about ten lines of 80 columns."""

    def __init__(self, headline: str, rows: list[tuple[str, str]], full: FullReport | None) -> None:
        self.headline = headline
        self.rows = rows
        self.full = full

    def __str__(self) -> str:
        return "\n".join([self.headline, *(_wrapped(name, text) for name, text in self.rows)])

    def __rich__(self) -> Group:
        """Return the same for a rich console, folded at its width."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=_NAME + 1)
        table.add_column(overflow="fold")
        for name, text in self.rows:
            table.add_row(f"  {name}", Text(text, _STYLES.get(name, "")))
        return Group(Text(self.headline), *([table] if self.rows else []))

    def html(self) -> str:
        """Return the same as a table of HTML, with the full report folded below it."""
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in self.rows
        )
        table = f"<table>{cells}</table>" if cells else ""
        more = f"<details><summary>everything</summary><pre>{html.escape(str(self.full))}</pre></details>"
        return f"<div>{html.escape(self.headline)}{table}{more if self.full is not None else ''}</div>"


class FullReport:
    """A line per patch and per file, and all else there is to say."""

    def __init__(
        self, headline: str, tables: list[list[tuple[str, ...]]], lists: list[tuple[str, tuple[str, ...]]]
    ) -> None:
        self.headline = headline
        self.tables = tables
        self.lists = lists

    def __str__(self) -> str:
        """Return it as plain text: a line per patch and per file, however wide, so that grep finds it."""
        lines = [self.headline]
        for rows in self.tables:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            padded = (zip(row, widths, strict=True) for row in rows)
            lines += ["", *("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded)]
        for title, items in self.lists:
            lines += ["", f"{title}:", *(f"  {item}" for item in items)]
        return "\n".join(lines)

    def __rich__(self) -> Group:
        """Return it for a rich console: the same, with cells that fold at the width of the terminal."""
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [Text(self.headline)]
        for head, *rows in self.tables:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for title in head:
                table.add_column(title, overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in row))
            parts += [Text(), table]
        for title, items in self.lists:
            parts += [Text(f"\n{title}:"), *(Padding(Text(item), (0, 0, 0, 2)) for item in items)]
        return Group(*parts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def patched_lines(targets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the rows that name what is patched: the trainers, then what goes with them; configs are counted."""
    trainers = [target for target in targets if _kind(target) == "trainer"]
    configs = [target for target in targets if _kind(target) == "config"]
    others = [target for target in targets if target not in {*trainers, *configs}]
    if configs:
        others.append(f"{len(configs)} {'config' if len(configs) == 1 else 'configs'}")
    for name, found in (("trainers", trainers), ("with", others)):
        if found:
            yield name, ", ".join(found)


def failure_lines(failed: Sequence[Outcome]) -> Iterator[str]:
    """Yield a line for each of the first failures, and one that counts the rest."""
    for entry in failed[:_FAILURES]:
        yield f"{entry.patch} on {entry.target}: {_shortened(entry.reason)}"
    if len(failed) > _FAILURES:
        yield f"and {len(failed) - _FAILURES} more"


def skip_lines(skipped: Sequence[Outcome]) -> Iterator[str]:
    """Yield a line per set of reasons: the patches, the targets that share them, and why."""
    of_target: dict[str, list[Outcome]] = {}
    for entry in skipped:
        of_target.setdefault(entry.target, []).append(entry)
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for target, entries in of_target.items():
        groups.setdefault(tuple((entry.patch, entry.reason) for entry in entries), []).append(target)
    for pairs, targets in groups.items():
        names = ", ".join(patch for patch, _ in pairs)
        reasons = "; ".join(dict.fromkeys(reason for _, reason in pairs))
        yield f"{names} on {', '.join(targets)}: {_shortened(reasons, _SKIP)}"


def _shortened(text: str, length: int = _REASON) -> str:
    return textwrap.shorten(text, length, placeholder=" ...")


def _kind(target: str) -> str:
    return TARGETS[target].kind if target in TARGETS else ""


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"  {name:{_NAME}} ",
        subsequent_indent=" " * (_NAME + 3),
        break_on_hyphens=False,
        break_long_words=False,
    )
