"""The command line: parses and prints. What it shows is computed in preview, environment, runtime and demo.

Exit status: 0 all is well, 1 patches do not fit this TRL, 2 the command cannot be carried out as given (a name that
is not known, no TRL there, a file of it that cannot be read), 3 the installed versions are known not to work together.

rich is imported by the commands that print tables, not here: it draws a random number when it is imported, and the
random state of a script under `trlpatch run` is the script's own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click

from trlpatch.errors import PatchError, TrlpatchError
from trlpatch.options import DISABLE, OldLogps, Options

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from trlpatch.compatibility.verdict import Verdict
    from trlpatch.environment import EnvironmentReport
    from trlpatch.preview import FilePreview, Preview
    from trlpatch.source.absent import Absence

DRIFT = 1
BAD_INPUT = 2
KNOWN_BAD = 3

GREY = "bright_black"

_MARKS = {"applied": "green", "skipped": GREY, "failed": "red"}
_STATES = {"tested": "green", "untested": "yellow", "incomplete": "yellow", "known-bad": "red"}

_trl_path = click.option(
    "--trl-path",
    type=click.Path(path_type=Path),
    help="A TRL to look at instead of the installed one: a directory that holds `trl`, or a wheel.",
)
_skip = click.option("--skip", multiple=True, metavar="PATCH", help="Leave this patch out; repeatable.")
_old_logps = click.option(
    "--old-logps",
    type=click.Choice(get_args(OldLogps)),
    default="stock",
    show_default=True,
    help='As PatchFastRL(old_logps=...): "reuse" is a patch more.',
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_targets = click.argument("targets", nargs=-1, metavar="[TARGET]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trlpatch")
def cli() -> None:
    """See and try what trlpatch changes in TRL.

    A TARGET is one TRL source file, by the name that `trlpatch plan` shows: grpo, rloo, vllm_generation, ... Without
    any, a command takes every target of the release.
    """


@cli.command("list")
@_json
def list_patches(as_json: bool) -> None:
    """List the patches: what each is for, and for which releases of which targets."""
    from trlpatch.preview import catalogue

    rows = catalogue()
    if as_json:
        _print_json(rows)
        return
    from rich.text import Text

    from trlpatch.console import grid, show

    for row in rows:
        show(
            Text.assemble((row["patch"], "bold"), f"  {row['summary']}"),
            grid(((target, "  ".join(ranges)) for target, ranges in row["targets"].items()), indent=4),
        )


@cli.command()
@_targets
@_trl_path
@_skip
@_old_logps
@_json
def plan(
    targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], old_logps: OldLogps, as_json: bool
) -> None:
    """Show, per target, which patches apply, in which variant, and which do not and why."""
    found = _preview(trl_path, targets, skip, old_logps)
    if as_json:
        _print_json(found.to_dict())
        return
    from rich.text import Text

    from trlpatch.console import grid, show

    show(_heading(found))
    for file in found.files:
        rows = [(Text(step.patch.name), Text(f"fits trl {step.variant.trl}")) for step in file.plan.steps]
        rows += [(Text(one.patch.name, GREY), Text(one.reason, GREY)) for one in file.plan.skips]
        show("", Text.assemble((file.source.target.name, "bold"), f"  {file.name}"), grid(rows, indent=4))
    for target, reason in found.absent.items():
        show("", Text.assemble((target, "bold"), f"  {reason}"))


@cli.command()
@_targets
@_trl_path
@_skip
@_old_logps
def diff(targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], old_logps: OldLogps) -> None:
    """Print the unified diff from TRL's own text to the patched text."""
    from trlpatch.console import show_diff

    found = _preview(trl_path, targets, skip, old_logps)
    show_diff("".join(file.diff() for file in found.files))
    _leave_on_drift(found)


@cli.command()
@_targets
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write to.")
@_trl_path
@_skip
@_old_logps
def dump(targets: Sequence[str], out: Path, trl_path: Path | None, skip: Sequence[str], old_logps: OldLogps) -> None:
    """Write the patched files to DIRECTORY/<TRL release>/trl/... and print their paths."""
    found = _preview(trl_path, targets, skip, old_logps)
    _leave_on_drift(found)
    for path in found.dump(out):
        click.echo(path)


@cli.command()
@_targets
@_trl_path
@_skip
@_old_logps
@_json
def check(
    targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], old_logps: OldLogps, as_json: bool
) -> None:
    """Tell whether every patch fits this TRL, and whether the versions of vLLM and transformers beside it ran with it.

    Needs neither torch nor vLLM. Exit status 1 where PatchFastRL() would raise because a patch does not fit, and
    nowhere else; 2 if there is no TRL that can be read; 3 if the versions are known not to work.
    """
    from trlpatch.compatibility.verdict import installed, judge

    found = _preview(trl_path, targets, skip, old_logps)
    versions = judge(found.install, installed(), at=found.where)
    bad = KNOWN_BAD if versions.state == "known-bad" else 0
    if as_json:
        _print_json({**found.to_dict(), "versions": versions.to_dict()})
        sys.exit(DRIFT if found.failures else bad)
    from rich.text import Text

    from trlpatch.console import grid, show

    rows = [(file.source.target.name, _verdict(found, file)) for file in found.files]
    rows += [(one.target.name, _absence(one)) for one in found.fit.absences]
    rows += [
        (name, Text("uses an engine as no patch knows", "red"))
        for name in sorted({o.target for o in found.fit.modules})
    ]
    show(_heading(found), grid(rows, indent=2))
    _leave_on_drift(found)
    show(Text(found.fit.verdict, "green"), *_facts([], versions))
    sys.exit(bad)


@cli.command()
@_json
def status(as_json: bool) -> None:
    """Show the installed TRL, what lies in the cache for it, the packages beside it, and what these allow.

    What the engines of a running process do is in that process: print(trlpatch.status()).
    """
    from trlpatch.environment import inspect_environment

    now = inspect_environment()
    if as_json:
        _print_json(now.to_dict())
        return
    from trlpatch.console import show

    show(*_facts(_environment_rows(now), now.verdict))


@cli.group()
def cache() -> None:
    """The directory of patched files."""


@cache.command("path")
def cache_path() -> None:
    """Print the cache directory. TRLPATCH_CACHE_DIR moves it."""
    from trlpatch.runtime.cache import path

    click.echo(path())


@cache.command("clear")
def cache_clear() -> None:
    """Delete every patched file; the next run makes those it needs again."""
    from trlpatch.runtime.cache import clear, path

    count = clear()
    click.echo(f"deleted {count} {'entry' if count == 1 else 'entries'} of {path()}")


@cli.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-m] SCRIPT [ARGS]...")
def run(words: Sequence[str]) -> None:
    """Patch TRL, then run a script (or with -m a module) as python would.

    For scripts that should not be edited; also as `accelerate launch -m trlpatch run SCRIPT`.
    """
    if words[:1] in (("-h",), ("--help",)):
        click.echo(click.get_current_context().get_help())
        return
    from trlpatch.runtime.run import run_script

    run_script(list(words), Options())


@cli.command()
@click.option("--steps", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_json
def demo(steps: int, seed: int, as_json: bool) -> None:
    """Train a tiny model with GRPO and LoRA, and show what was patched and how the reward moves.

    Needs `pip install "trlpatch[demo]"`, no GPU and no network. Rolls out on an attached engine where vLLM is
    installed, else on transformers.
    """
    from trlpatch.demo.show import as_dict, play

    result = play(steps, seed, quiet=as_json)
    if as_json:
        _print_json(as_dict(result))


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(standalone_mode=False)
    except (click.ClickException, click.Abort, TrlpatchError) as error:
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


def _explain(error: Exception) -> int:
    """Print one message for `error` and return the exit status that goes with it."""
    if isinstance(error, click.ClickException):
        error.show()
        return BAD_INPUT
    # click drops colours where stderr is no terminal; NO_COLOR (no-color.org) drops them there, too.
    label = "error:" if os.environ.get("NO_COLOR") else click.style("error:", fg="red")
    click.echo(f"{label} {str(error) or 'aborted'}", err=True)
    return DRIFT if isinstance(error, PatchError) else BAD_INPUT


def _preview(trl_path: Path | None, targets: Sequence[str], skip: Sequence[str], old_logps: OldLogps) -> Preview:
    from trlpatch.preview import preview

    options = Options(skip=tuple(skip), old_logps=old_logps)
    return preview(trl_path, targets, frozenset(options.skip), frozenset(options.asked_for))


def _heading(found: Preview) -> str:
    return f"TRL {found.install.version} at {found.where}" + (
        ": newer than every tested release, decided by its anchors" if found.fit.untested else ""
    )


def _verdict(found: Preview, file: FilePreview) -> Text:
    from rich.text import Text

    from trlpatch.runtime.fit import HELD_BACK

    target = file.source.target.name
    counts = {"applied": 0, "skipped": 0, "failed": 0}
    for outcome in file.rewritten.outcomes:
        counts[outcome.status] += 1
    texts = [Text(f"{count} {status}", _MARKS[status]) for status, count in counts.items() if count]
    if target in found.fit.held_back:
        texts.append(Text(HELD_BACK, "yellow"))
    return Text(", ").join(texts)


def _absence(absence: Absence) -> Text:
    from rich.text import Text

    if absence.failed:
        return Text.assemble(("1 failed", _MARKS["failed"]), f": {absence.reason}")
    return Text(f"not in this TRL: {absence.reason}", GREY)


def _facts(rows: Iterable[tuple[str, str]], verdict: Verdict) -> Iterator[RenderableType]:
    """Yield named facts and the verdict on versions as a table, and the verdict's pip line, which is for copying."""
    from rich.text import Text

    from trlpatch.console import grid

    width = len("installed")  # the longest name, in every command
    state, *lines = verdict.lines()
    suggestion = [lines.pop()] if verdict.suggestion else []
    verdict_rows = [("versions", Text(state, _STATES[verdict.state])), *(("", Text(line)) for line in lines)]
    yield grid([*((name, Text(text)) for name, text in rows), *verdict_rows], first_column=width)
    yield from (f"{'':{width}}  {line}" for line in suggestion)


def _environment_rows(now: EnvironmentReport) -> Iterator[tuple[str, str]]:
    yield "TRL", f"{now.trl} at {now.where}{' (newer than every tested release)' if now.untested else ''}"
    if now.disabled:
        yield "disabled", f"{DISABLE} is set: PatchFastRL() does nothing"
    writable = "" if now.cache_writable else ", cannot be written: patched text would be kept in memory"
    yield "cache", f"{now.cache} ({now.cache_bytes / 1e6:.1f} MB{writable})"
    for state, wanted in (("cached", True), ("not yet", False)):
        if names := [name for name, hit in now.cached.items() if hit is wanted]:
            yield state, ", ".join(names)
    yield from (("absent", f"{target}: {reason}") for target, reason in now.absent.items())
    packages = [f"{name} {version}" for name, version in now.packages.items() if version]
    absent = [name for name, version in now.packages.items() if not version]
    yield "installed", ", ".join(packages) + (f"; not installed: {', '.join(absent)}" if absent else "")
    yield "loading", f"FastLanguageModel: {'; '.join(now.loading) or 'everything it can use is installed'}"


def _leave_on_drift(found: Preview) -> None:
    if found.failures:
        click.echo(f"\nTRL {found.install.version}: {found.fit.verdict}\n\n{found.drift()}", err=True)
        sys.exit(DRIFT)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
