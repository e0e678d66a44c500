"""serve: run the server that fits what was exported, until it is told to end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from trlpatch.cli.common import DRIFT, json_option, print_json
from trlpatch.serving.names import BACKENDS, STARTUP_TIMEOUT

if TYPE_CHECKING:
    from trlpatch.serving import Server, Startup

REPORT_EVERY = 15.0
"""Seconds between two lines of progress where stderr is no terminal."""

POLL = 0.2


class _Asked(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@click.command(
    context_settings={"ignore_unknown_options": False}, short_help="Serve a model, an adapter or a GGUF file."
)
@click.argument("path")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; by default a free one.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--base", metavar="DIR_OR_HUB_ID", help="Base model, where it is not the one that the adapter names.")
@click.option("--name", help="What requests call the model; by default the name of the directory or file.")
@click.option(
    "--startup-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=STARTUP_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="How long it may take until it answers.",
)
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), help="Keep what the server says in this file.")
@click.option("--check", is_flag=True, help="Compare its log-probabilities with those of transformers, and end.")
@click.option(
    "--reference",
    metavar="CHECKPOINT",
    help="What --check compares with, where that is not PATH: the checkpoint that a GGUF file was made of, say.",
)
@json_option
@click.argument("forwarded", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF THE SERVER]")
def serve(
    path: str,
    port: int | None,
    check: bool,
    reference: str | None,
    as_json: bool,
    forwarded: Sequence[str],
    **chosen: Any,
) -> None:
    """Serve a model, an adapter or a GGUF file with an OpenAI API, until Ctrl-C.

    PATH is a directory of transformers (what `trlpatch export merged` writes), an adapter or a checkpoint of a trainer
    that holds one, or a GGUF file. vLLM serves the first two; a GGUF file is served by vLLM with vllm-gguf-plugin on
    CUDA, elsewhere by xllamacpp or llama-cpp-python.
    """
    if forwarded and not forwarded[0].startswith("-"):
        raise click.UsageError(f"Unexpected argument {forwarded[0]!r}; options of the server follow after --")
    if (reference is not None or as_json) and not check:
        raise click.UsageError("--reference and --json are options of --check")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _ask_to_end)
    from trlpatch.serving import serve as start

    progress = _Progress()
    try:
        with start(
            path, port=port, options=tuple(forwarded), logprobs=check, on_progress=progress.show, **chosen
        ) as server:
            progress.end()
            if check:
                found = server.check(reference, stop=True)
                print_json(found.to_dict()) if as_json else click.echo(str(found))
                sys.exit(0 if found.passed else DRIFT)
            _introduce(server)
            while server.status() is None:
                time.sleep(POLL)
            raise server.failure()
    except _Asked as asked:
        sys.exit(128 + asked.number)
    finally:
        progress.end()


def _introduce(server: Server) -> None:
    click.echo(f"{server.artifact}", err=True)
    click.echo(f"{server.model} at {server.url}, by {server.backend}; log {server.log}; Ctrl-C ends it", err=True)
    click.echo(server.curl())


def _ask_to_end(number: int, frame: FrameType | None) -> None:
    raise _Asked(number)


class _Progress:
    """One line that changes on a terminal, a line every REPORT_EVERY seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._shown = False

    def show(self, startup: Startup) -> None:
        text = f"starting, {startup.seconds:.0f} s of {startup.timeout:.0f}"
        if startup.line:
            text += f": {startup.line}"
        if self._terminal:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            click.echo("\r\x1b[2K" + text[: columns - 1], err=True, nl=False)
            self._shown = True
        elif startup.seconds >= self._next:
            self._next = startup.seconds + REPORT_EVERY
            click.echo(text[:200], err=True)

    def end(self) -> None:
        if self._shown:
            click.echo("\r\x1b[2K", err=True, nl=False)
            self._shown = False
