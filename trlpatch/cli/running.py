"""run and demo: what trains, with TRL patched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from trlpatch.cli.common import json_option, print_json, skip_option
from trlpatch.options import ALLOWED, Options


def _patching(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the arguments of PatchFastRL as options."""
    for name, words in reversed(ALLOWED.items()):
        option = click.option(
            f"--{name.replace('_', '-')}", type=click.Choice(words), help=f"As PatchFastRL({name}=)."
        )
        command = option(command)
    algorithm = click.option("--algorithm", metavar="NAME", help="Patch only what this trainer needs: grpo, rloo, ...")
    return algorithm(skip_option(command))


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    short_help="Run a script, a module or a program with TRL patched.",
)
@_patching
@click.option("-q", "--quiet", is_flag=True, help="Do not say on stderr what was patched; as TRLPATCH_QUIET=1.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-m] SCRIPT|PROGRAM [ARGS]...")
def run(words: Sequence[str], quiet: bool, **chosen: Any) -> Callable[[], None] | None:
    """Patch TRL, then run a script (or with -m a module) as python would, or a program: trl, accelerate, torchrun.

    For what should not be edited. Child processes are patched as well, unless python reads no PYTHONPATH there (-E,
    -I) or no sitecustomize (-S). Options come before SCRIPT; what follows it is its own.
    """
    if words[:1] in (("-h",), ("--help",)):
        click.echo(click.get_current_context().get_help())
        return None
    from trlpatch.runtime.run import run_script

    options = Options(**{name: value for name, value in chosen.items() if value is not None})
    return functools.partial(run_script, list(words), options, quiet=quiet)


@click.command(short_help="Train a tiny model, without a GPU, and see what happens.")
@click.option("--steps", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the model and its adapter there, to export them.",
)
@json_option
def demo(steps: int, seed: int, out: Path | None, as_json: bool) -> None:
    """Train a tiny model with GRPO and LoRA, and show what was patched and how the reward moves.

    Needs the packages of the extra "demo", no GPU and no network. Rolls out on an attached engine where vLLM is
    installed, else on transformers.
    """
    from trlpatch.demo.show import as_dict, play

    result = play(steps, seed, out, quiet=as_json)
    if as_json:
        print_json(as_dict(result))
