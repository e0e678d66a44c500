"""list, plan, diff, dump, check, status, cache: what trlpatch changes in a TRL, and what is installed beside it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trlpatch.cli.common import DRIFT, GREY, KNOWN_BAD, json_option, print_json, skip_option
from trlpatch.errors import CannotWrite
from trlpatch.options import ALLOWED, DISABLE, Options

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from trlpatch.compatibility.verdict import Verdict
    from trlpatch.environment import EnvironmentReport
    from trlpatch.preview import FilePreview, Preview
    from trlpatch.rewrite.patch import Patch
    from trlpatch.source.absent import Absence

_MARKS = {"applied": "green", "skipped": GREY, "failed": "red"}
_STATES = {"tested": "green", "untested": "yellow", "incomplete": "yellow", "known-bad": "red"}

_PAGE = 80

_trl_path = click.option(
    "--trl-path",
    type=click.Path(path_type=Path),
    help="A TRL to look at instead of the installed one: a directory that holds `trl`, or a wheel.",
)


def _optional_patches(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `PatchFastRL` that ask for a patch more; the command gets them as keyword arguments."""
    for name in ("old_logps", "logps"):
        words = ALLOWED[name]
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=click.Choice(words),
            default=words[0],
            show_default=True,
            help=f'As PatchFastRL({name}=...): "{words[1]}" is a patch more.',
        )(command)
    return command


_targets = click.argument("targets", nargs=-1, metavar="[TARGET]...")


@click.command("list", short_help="List the patches: what for, and which releases.")
@json_option
def list_patches(as_json: bool) -> None:
    """List the patches: what each is for, and for which releases of which targets."""
    from trlpatch.preview import catalogue

    rows = catalogue()
    if as_json:
        print_json(rows)
        return
    from rich.text import Text

    from trlpatch.console import grid, show

    for row in rows:
        show(
            grid([(Text(row["patch"], "bold"), Text(row["summary"]))]),
            grid(((target, "  ".join(ranges)) for target, ranges in row["targets"].items()), indent=4),
        )


@click.command(short_help="Show which patches apply to which file, and why not.")
@_targets
@_trl_path
@skip_option
@_optional_patches
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page instead, side by side.")
@json_option
def plan(
    targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], html: Path | None, as_json: bool, **asked: str
) -> None:
    """Show, per target, which patches apply, in which variant, and which do not and why."""
    found = _preview(trl_path, targets, skip, asked)
    if html is not None:
        _write_page(found, html)
        return
    if as_json:
        print_json(found.to_dict())
        return
    from rich.text import Text

    from trlpatch.console import grid, show

    show(_heading(found))
    for file in found.files:
        rows = [(Text(step.patch.name), Text(f"fits trl {step.variant.trl}")) for step in file.plan.steps]
        rows += [(Text(one.patch.name, GREY), Text(one.reason, GREY)) for one in file.plan.skips]
        rows += [(Text(one.name, GREY), Text(f"off; on with {_asks(one)}", GREY)) for one in file.plan.off]
        show("", Text.assemble((file.source.target.name, "bold"), f"  {file.name}"), grid(rows, indent=4))
    for target, reason in found.absent.items():
        show("", Text.assemble((target, "bold"), f"  {reason}"))


def _asks(patch: Patch) -> str:
    """Return how PatchFastRL and the commands of this file are asked for an optional patch."""
    name, word = patch.option.replace('"', "").split("=")
    return f"PatchFastRL({patch.option}), here --{name.replace('_', '-')} {word}"


@click.command()
@_targets
@_trl_path
@skip_option
@_optional_patches
def diff(targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], **asked: str) -> None:
    """Print the unified diff from TRL's own text to the patched text."""
    from trlpatch.console import show_diff

    found = _preview(trl_path, targets, skip, asked)
    show_diff("".join(file.diff() for file in found.files))
    _leave_on_drift(found)


@click.command(short_help="Write the patched files into a directory.")
@_targets
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write to.")
@_trl_path
@skip_option
@_optional_patches
def dump(targets: Sequence[str], out: Path, trl_path: Path | None, skip: Sequence[str], **asked: str) -> None:
    """Write the patched files to DIRECTORY/<TRL release>/trl/... and print their paths."""
    found = _preview(trl_path, targets, skip, asked)
    _leave_on_drift(found)
    for path in found.dump(out):
        click.echo(path)


@click.command(short_help="Tell whether every patch fits, and the versions ran together.")
@_targets
@_trl_path
@skip_option
@_optional_patches
@json_option
def check(targets: Sequence[str], trl_path: Path | None, skip: Sequence[str], as_json: bool, **asked: str) -> None:
    """Tell whether every patch fits this TRL, and whether the versions of vLLM and transformers beside it ran with it.

    Needs neither torch nor vLLM. Exit status 1 where PatchFastRL() would raise because a patch does not fit, and
    nowhere else; 2 if there is no TRL that can be read; 3 if the versions are known not to work.
    """
    from trlpatch.compatibility.verdict import installed, judge

    found = _preview(trl_path, targets, skip, asked)
    versions = judge(found.install, installed(), at=found.where)
    bad = KNOWN_BAD if versions.state == "known-bad" else 0
    if as_json:
        print_json({**found.to_dict(), "versions": versions.to_dict()})
        sys.exit(DRIFT if found.failures else bad)
    from rich.text import Text

    from trlpatch.console import grid, show

    rows = [(file.source.target.name, _verdict(found, file)) for file in found.files]
    rows += [(one.target.name, _absence(one)) for one in found.fit.absences]
    rows += [
        (name, Text("uses an engine as no patch knows", "red"))
        for name in sorted({o.target for o in found.fit.modules})
    ]
    rows += [(one.target, Text(found.fit.through_generation, "yellow")) for one in found.fit.untaught]
    show(_heading(found), grid(rows, indent=2))
    _leave_on_drift(found)
    show(*(Text(line, "green") for line in _folded(found.fit.verdict)))
    show(*(line for one in found.fit.untaught for line in _folded(f"{one.target}: {one.reason}")))
    show(*_facts([], versions))
    sys.exit(bad)


@click.command(short_help="Show the installed TRL, the cache and the packages beside.")
@json_option
def status(as_json: bool) -> None:
    """Show the installed TRL, what lies in the cache for it, the packages beside it, and what these allow.

    What the engines of a running process do is in that process: print(trlpatch.status()).
    """
    from trlpatch.environment import inspect_environment

    now = inspect_environment()
    if as_json:
        print_json(now.to_dict())
        return
    from trlpatch.console import show

    show(*_facts(_environment_rows(now), now.verdict))


@click.group()
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


def _preview(trl_path: Path | None, targets: Sequence[str], skip: Sequence[str], asked: Mapping[str, Any]) -> Preview:
    from trlpatch.preview import preview

    options = Options(skip=tuple(skip), **asked)
    return preview(trl_path, targets, frozenset(options.skip), frozenset(options.asked_for))


def _write_page(found: Preview, path: Path) -> None:
    from trlpatch.plan_page import render

    try:
        path.write_text(render(found), encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"Cannot write {path}: {error.strerror or error}. Name another file with --html.") from error
    click.echo(path)


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
    lines = [part for line in lines for part in _folded(line, _PAGE - width - 2)]
    verdict_rows = [("versions", Text(state, _STATES[verdict.state])), *(("", Text(line)) for line in lines)]
    yield grid([*((name, Text(text)) for name, text in rows), *verdict_rows], least=(width,))
    yield from (f"{'':{width}}  {line}" for line in suggestion)


def _folded(sentence: str, width: int = _PAGE) -> list[str]:
    """Fold what is a sentence, and no row for grep, at the width of a page; paths and URLs stay whole."""
    return textwrap.wrap(sentence, width, break_long_words=False, break_on_hyphens=False)


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
