"""The command line: parses and prints. What it shows is computed in preview, environment, runtime and demo.

Exit status: 0 all is well, 1 patches do not fit this TRL, 2 the command cannot be carried out as given, 3 the
installed versions are known not to work together.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from trlpatch.errors import PatchError, TrlpatchError

if TYPE_CHECKING:
    from trlpatch.compatibility.verdict import Verdict
    from trlpatch.preview import FilePreview, Preview

DRIFT = 1
BAD_INPUT = 2
KNOWN_BAD = 3

_MARKS = {"applied": "green", "skipped": "bright_black", "failed": "red"}
_STATES = {"tested": "green", "untested": "yellow", "incomplete": "yellow", "known-bad": "red"}

_trl_path = click.option(
    "--trl-path",
    type=click.Path(path_type=Path),
    help="A TRL to look at instead of the installed one: a directory that holds `trl`, or a wheel.",
)
_skip = click.option("--skip", multiple=True, metavar="PATCH", help="Leave this patch out; repeatable.")
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
    for row in rows:
        click.echo(f"{_style(row['patch'], bold=True)}  {row['summary']}")
        width = max(map(len, row["targets"]))
        for target, ranges in row["targets"].items():
            click.echo(f"    {target.ljust(width)}  {'  '.join(ranges)}")


@cli.command()
@_targets
@_trl_path
@_skip
@_json
def plan(targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], as_json: bool) -> None:
    """Show, per target, which patches apply, in which variant, and which do not and why."""
    found = _preview(trl_path, targets, skip)
    if as_json:
        _print_json(found.to_dict())
        return
    click.echo(_heading(found))
    for file in found.files:
        click.echo(f"\n{_style(file.source.target.name, bold=True)}  {file.name}")
        for step in file.plan.steps:
            click.echo(f"    {step.patch.name.ljust(16)}  fits trl {step.variant.trl}")
        for skipped in file.plan.skips:
            click.echo(_style(f"    {skipped.patch.name.ljust(16)}  {skipped.reason}", fg="bright_black"))


@cli.command()
@_targets
@_trl_path
@_skip
def diff(targets: Sequence[str], trl_path: Path | None, skip: Sequence[str]) -> None:
    """Print the unified diff from TRL's own text to the patched text."""
    found = _preview(trl_path, targets, skip)
    _print_diff(file.diff() for file in found.files)
    _leave_on_drift(found)


@cli.command()
@_targets
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write to.")
@_trl_path
@_skip
def dump(targets: Sequence[str], out: Path, trl_path: Path | None, skip: Sequence[str]) -> None:
    """Write the patched files to DIRECTORY/<TRL release>/trl/... and print their paths."""
    found = _preview(trl_path, targets, skip)
    _leave_on_drift(found)
    for path in found.dump(out):
        click.echo(path)


@cli.command()
@_targets
@_trl_path
@_skip
@_json
def check(targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], as_json: bool) -> None:
    """Tell whether every patch fits this TRL, and whether the versions of vLLM and transformers beside it ran with it.

    Needs neither torch nor vLLM. Exit status 1 if a patch does not fit, 3 if the versions are known not to work.
    """
    from trlpatch.compatibility.verdict import installed, judge

    found = _preview(trl_path, targets, skip)
    versions = judge(found.install, installed(), at=found.where)
    bad = KNOWN_BAD if versions.state == "known-bad" else 0
    if as_json:
        _print_json({**found.to_dict(), "versions": versions.to_dict()})
        sys.exit(DRIFT if found.failures else bad)
    click.echo(_heading(found))
    width = max((len(file.source.target.name) for file in found.files), default=0)
    for file in found.files:
        click.echo(f"  {file.source.target.name.ljust(width)}  {_verdict(found, file)}")
    _leave_on_drift(found)
    click.echo(_style("every patch fits", fg="green"))
    _print_versions(versions)
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
    click.echo(f"TRL        {now.trl} at {now.where}{' (newer than every tested release)' if now.untested else ''}")
    if now.disabled:
        click.echo("disabled   TRLPATCH_DISABLE is set: PatchFastRL() does nothing")
    writable = "" if now.cache_writable else ", cannot be written: patched text would be kept in memory"
    click.echo(f"cache      {now.cache} ({now.cache_bytes / 1e6:.1f} MB{writable})")
    for state, names in (
        ("cached", [name for name, hit in now.cached.items() if hit]),
        ("not yet", [name for name, hit in now.cached.items() if not hit]),
    ):
        if names:
            click.echo(f"{state.ljust(11)}{', '.join(names)}")
    packages = [f"{name} {version}" for name, version in now.packages.items() if version]
    absent = [name for name, version in now.packages.items() if not version]
    click.echo(f"installed  {', '.join(packages)}" + (f"; not installed: {', '.join(absent)}" if absent else ""))
    click.echo(f"loading    FastLanguageModel: {'; '.join(now.loading) or 'everything it can use is installed'}")
    _print_versions(now.verdict)


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
    from trlpatch.options import Options
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
    click.echo(f"{_style('error:', fg='red')} {str(error) or 'aborted'}", err=True)
    return DRIFT if isinstance(error, PatchError) else BAD_INPUT


def _preview(trl_path: Path | None, targets: Sequence[str], skip: Iterable[str]) -> Preview:
    from trlpatch.preview import preview

    return preview(trl_path, targets, frozenset(skip))


def _heading(found: Preview) -> str:
    return f"TRL {found.install.version} at {found.where}" + (
        ": newer than every tested release, decided by its anchors" if found.untested else ""
    )


def _verdict(found: Preview, file: FilePreview) -> str:
    target = file.source.target.name
    counts = {"applied": 0, "skipped": 0, "failed": 0}
    for outcome in file.rewritten.outcomes:
        counts[outcome.status] += 1
    texts = [_style(f"{count} {status}", fg=_MARKS[status]) for status, count in counts.items() if count]
    if target in found.held_back:
        texts.append(_style("stays stock: shares an engine with a target that does not fit", fg="yellow"))
    return ", ".join(texts)


def _print_versions(verdict: Verdict) -> None:
    first, *others = verdict.lines()
    click.echo(f"versions   {_style(first, fg=_STATES[verdict.state])}")
    for line in others:
        click.echo(f"           {line}")


def _leave_on_drift(found: Preview) -> None:
    if found.failures:
        click.echo(f"\nPatches do not fit TRL {found.install.version}:\n\n{found.drift()}", err=True)
        sys.exit(DRIFT)


def _print_diff(diffs: Iterable[str]) -> None:
    for text in diffs:
        for line in text.splitlines(keepends=True):
            click.echo(_coloured(line), nl=False)


def _coloured(line: str) -> str:
    if line.startswith(("---", "+++")):
        return _style(line, bold=True)
    colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
    return _style(line, fg=colour) if colour else line


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _style(text: str, **how: Any) -> str:
    # click drops colours where stdout is no terminal; NO_COLOR (no-color.org) drops them there too.
    return text if os.environ.get("NO_COLOR") else click.style(text, **how)
