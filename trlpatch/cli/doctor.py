"""doctor: what of this machine and its packages stands in the way, and what an error message means."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

import click

from trlpatch.cli.common import GREY, json_option, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trlpatch.doctor.diagnosis import Diagnosis

_UNHEALTHY = 1
_UNKNOWN_ERROR = 2
_COLOURS = {"ok": "green", "info": GREY, "skip": GREY, "warn": "yellow", "fail": "red"}


@click.command(short_help="Check this machine and its packages, and say what to do.")
@click.option("--error", "message", metavar="TEXT", help="Explain this error message instead.")
@click.option("--log", type=click.File(errors="replace"), help="Explain the errors in this log instead; - is stdin.")
@json_option
def doctor(message: str | None, log: TextIO | None, as_json: bool) -> None:
    """Check this machine: system, GPU, driver, memory, compilers, packages, environment; and say what to do.

    Imports neither torch nor vLLM, and sends nothing. Exit status 1 where rollouts on vLLM cannot work here.
    """
    if message is not None or log is not None:
        _explain(f"{message or ''}\n{log.read() if log else ''}", as_json=as_json)
        return
    from trlpatch.doctor.diagnosis import diagnose

    found = diagnose()
    if as_json:
        print_json(found.to_dict())
        sys.exit(0 if found.healthy else _UNHEALTHY)
    from rich.text import Text

    from trlpatch.console import show

    show(*_results(found), "", Text(found.summary, "green" if found.healthy else "red"))
    show('an error message: trlpatch doctor --error "MESSAGE", or docs/troubleshooting.md')
    sys.exit(0 if found.healthy else _UNHEALTHY)


def _results(found: Diagnosis) -> Iterator[RenderableType]:
    """Yield a row for each result; on a terminal a command has a line of its own, which is never folded."""
    from rich.text import Text

    from trlpatch.console import grid

    terminal = sys.stdout.isatty()
    least = [max(map(len, column)) for column in zip(*((one.level, one.check) for one in found.results), strict=True)]
    rows: list[tuple[Text, str, Text]] = []
    for one in found.results:
        text = Text(one.found)
        for more in (one.advice, "" if terminal else one.command):
            if more:
                text.append(f"\n{more}" if terminal else f": {more}", GREY)
        rows.append((Text(one.level, _COLOURS[one.level]), one.check, text))
        if terminal and one.command:
            yield grid(rows, least=least)
            yield f"  {one.command}"
            rows = []
    yield grid(rows, least=least)


def _explain(text: str, *, as_json: bool) -> None:
    from trlpatch.doctor.known_errors import look_up

    known = list(look_up(text))
    if as_json:
        print_json([{"message": one.message, "cause": one.cause, "solution": one.solution} for one in known])
        sys.exit(0 if known else _UNKNOWN_ERROR)
    if not known:
        click.echo("not among the messages that are known: docs/troubleshooting.md lists them", err=True)
        sys.exit(_UNKNOWN_ERROR)
    from rich.text import Text

    from trlpatch.console import show

    for one in known:
        show(Text(one.message, "bold"), f"  {one.cause}", f"  {one.solution}")
