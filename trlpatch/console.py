"""Output on stdout: rich tables and highlighted diffs on a terminal, one plain line per row where there is none."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

UNBOUNDED = 100_000
"""Columns where stdout is no terminal: a row stays on one line, whatever COLUMNS says, so that grep finds it."""


def stdout_console(*, quiet: bool = False) -> Console:
    """Return a rich console on stdout; without any escape code where stdout is no terminal or NO_COLOR is set.

    FORCE_COLOR brings the colours into a file or pipe, too.
    """
    return Console(
        quiet=quiet,
        highlight=False,
        markup=False,
        emoji=False,
        # By itself rich drops the colours for NO_COLOR and keeps bold and dim (no-color.org: no ANSI colour at all).
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if sys.stdout.isatty() else UNBOUNDED,
    )


def show(*parts: RenderableType, console: Console | None = None) -> None:
    """Print each part on lines of its own.

    Text is left to the terminal to wrap, so that commands and paths can be copied; tables fold their cells. Where
    there is no terminal, the blanks that fill up a table's last column are left out.
    """
    out = stdout_console() if console is None else console
    with out.capture() as captured:
        for part in parts:
            out.print(part, soft_wrap=isinstance(part, (str, Text)))
    text = captured.get()
    out.file.write(re.sub(" +$", "", text, flags=re.MULTILINE) if out.width == UNBOUNDED else text)


def grid(rows: Iterable[Sequence[RenderableType]], *, indent: int = 0, least: Sequence[int] = ()) -> Padding:
    """Return rows as a table without lines; what is too long for a terminal is folded inside its column.

    Args:
        rows: cells.
        indent: blanks before each row.
        least: the least widths of the first columns.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in least:
        table.add_column(overflow="fold", min_width=width)
    for row in rows:
        while len(table.columns) < len(row):
            table.add_column(overflow="fold")
        table.add_row(*row)
    return Padding(table, (0, 0, 0, indent), expand=False)


def show_diff(diff: str) -> None:
    """Print a unified diff: byte for byte where it is not coloured, so that `patch` and `git apply` read it.

    On a terminal through a pager, as git does: PAGER names it, LESS its options, which are git's where nobody says.
    """
    out = stdout_console()
    text = diff
    if out.color_system is not None:
        # The terminal's own colours, on its own background.
        lines = Syntax("", "diff", theme="ansi_dark", background_color="default").highlight(diff)
        with out.capture() as captured:
            out.print(lines, end="", soft_wrap=True)
        text = captured.get()
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        out.file.write(text)
        return
    from click import echo_via_pager

    os.environ.setdefault("LESS", "FRX")
    echo_via_pager(text, color=out.color_system is not None)
