"""The command line: parses and prints. What it shows is computed in preview, environment, runtime and demo.

Exit status: 0 all is well, 1 patches do not fit this TRL or `serve --check` finds a difference, 2 the command cannot
be carried out as given (a name that is not known, no TRL there, a file of it that cannot be read), 3 the installed
versions are known not to work together, 130 interrupted.

rich is imported by the commands that print tables, not here: it draws a random number when it is imported, and the
random state of a script under `trlpatch run` is the script's own.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from trlpatch.cli import export, patches, running, serving
from trlpatch.cli.common import BAD_INPUT, DRIFT, INTERRUPTED
from trlpatch.cli.doctor import doctor
from trlpatch.cli.scale import scale
from trlpatch.errors import PatchError, TrlpatchError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trlpatch")
def cli() -> None:
    """See and try what trlpatch changes in TRL.

    A TARGET is one TRL source file, by the name that `trlpatch plan` shows: grpo, rloo, vllm_generation, ... Without
    any, a command takes every target of the release.
    """


for _command in (
    patches.list_patches,
    patches.plan,
    patches.diff,
    patches.dump,
    patches.check,
    patches.status,
    patches.cache,
    running.run,
    running.demo,
    serving.serve,
    doctor,
    export.export,
    scale,
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(standalone_mode=False)
        if callable(status):  # `run`: what a script raises is the script's, and click does not see it
            status = status()
    except (click.Abort, click.ClickException, KeyboardInterrupt, TrlpatchError) as error:
        if _raised_by_script(error):
            raise
        status = _explain(error)
    sys.exit(status)


def _raised_by_script(error: BaseException) -> bool:
    """Tell whether what `trlpatch run` runs raised it: then it needs its traceback."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == "runpy":
            return True
        traceback = traceback.tb_next
    return False


def _explain(error: BaseException) -> int:
    """Print one message for `error` and return the exit status that goes with it."""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):  # click makes the one of the other
        click.echo("interrupted", err=True)
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return BAD_INPUT
    # click drops colours where stderr is no terminal; NO_COLOR (no-color.org) drops them there, too.
    label = "error:" if os.environ.get("NO_COLOR") else click.style("error:", fg="red")
    click.echo(f"{label} {error}", err=True)
    return DRIFT if isinstance(error, PatchError) else BAD_INPUT
