"""export: merged weights, adapters and GGUF files, from a checkpoint or an adapter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from trlpatch.cli.common import json_option, print_json
from trlpatch.errors import MissingPackage

if TYPE_CHECKING:
    from trlpatch.export.gguf.export import GgufExport
    from trlpatch.export.merged import Exported

_out = click.option("--out", required=True, metavar="DIR", help="Is complete at the end, or not there.")
_base = click.option("--base", metavar="MODEL", help="The 16-bit base model, where the adapter does not name it.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace DIR whatever is in it.")
_code = click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
_revision = click.option("--revision", metavar="NAME", help="Of the base model on the hub.")
_checkpoint = click.argument("checkpoint", metavar="CHECKPOINT")


@click.group(short_help="Write merged weights, the adapter or GGUF of a checkpoint.")
@click.pass_context
def export(context: click.Context) -> None:
    """Write what a training run made, for others to load: merged weights, the adapter, GGUF.

    CHECKPOINT is a trainer's checkpoint (outputs/checkpoint-500), a directory with an adapter or a whole model, or a
    model id on the hub. No GPU and no vLLM are needed, and no second copy of the model in memory.
    """
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing and not set(sys.argv) & {"-h", "--help"}:
        raise MissingPackage(
            f"trlpatch export: {', '.join(missing)} not installed here; pip install torch transformers peft"
        )
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what is half-written goes
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            context.call_on_close(functools.partial(signal.signal, number, signal.signal(number, _end)))


@export.command()
@_checkpoint
@_out
@_base
@click.option("--dtype", type=click.Choice(("bfloat16", "float16", "float32")), help="The base model's by default.")
@click.option("--shard-size", default="5GB", show_default=True, help="Of one file.")
@click.option(
    "--verify",
    type=click.Choice(("auto", "logps", "none")),
    default="auto",
    show_default=True,
    help="auto: every tensor, and log-probabilities of models up to 1 GiB in float32; logps: of any model.",
)
@_overwrite
@_revision
@_code
@json_option
def merged(
    checkpoint: str,
    out: str,
    base: str | None,
    dtype: str | None,
    shard_size: str,
    verify: str,
    overwrite: bool,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Merge the adapter into its 16-bit base: a model that loads without PEFT.

    The sum is made in float32 and rounded once; what the rounding keeps of the adapter is printed.
    """
    from trlpatch.export.merged import dtype_of, estimate, size_of, write_merged
    from trlpatch.export.opening import open_source

    source = open_source(checkpoint, base=base, revision=revision, trust_remote_code=trust_remote_code)
    stored = dtype_of(dtype, source)
    need = estimate(source, stored, max_shard_size=shard_size)
    if not as_json:
        files = f"{need.shards} files" if need.shards > 1 else "one file"
        click.echo(
            f"{source.parameters:,} parameters in {str(stored).removeprefix('torch.')}: {size_of(need.bytes)} in "
            f"{files}, {size_of(need.working)} of memory to work with"
        )
    checks: dict[str, bool | str] = {"auto": True, "logps": "logps", "none": False}
    with _progress(quiet=as_json) as tell:
        done = write_merged(
            source,
            out,
            dtype=stored,
            max_shard_size=shard_size,
            overwrite=overwrite,
            verify=checks[verify],
            progress=tell,
        )
    _say(done, as_json)


@export.command()
@_checkpoint
@_out
@click.option("--base", metavar="MODEL", help="What the adapter's config is to name as its base model.")
@click.option("--dtype", type=click.Choice(("bfloat16", "float16", "float32")), help="As it was trained by default.")
@_overwrite
@json_option
def adapter(checkpoint: str, out: str, base: str | None, dtype: str | None, overwrite: bool, as_json: bool) -> None:
    """Write the adapter alone, without the optimizer and the rest of a trainer's checkpoint."""
    from trlpatch.export.adapter_files import write_adapter

    _say(write_adapter(checkpoint, out, base=base, dtype=dtype, overwrite=overwrite), as_json)


@export.command()
@_checkpoint
@_out
@_base
@click.option(
    "--quant",
    "--type",
    "types",
    multiple=True,
    default=("q8_0",),
    show_default=True,
    metavar="TYPE[,TYPE]...",
    help="f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q2_k, ...; repeatable.",
)
@click.option("--tokenizer-pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it knows it not.")
@click.option("--accept", multiple=True, metavar="FINDING", help="Export although llama.cpp computes it otherwise.")
@click.option("--no-verify", is_flag=True, help="Do not run the files.")
@_revision
@_code
@json_option
def gguf(
    checkpoint: str,
    out: str,
    base: str | None,
    types: tuple[str, ...],
    tokenizer_pre: str | None,
    accept: tuple[str, ...],
    no_verify: bool,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write GGUF files with the adapter merged, for llama.cpp and what is built on it.

    Each file is run by llama.cpp and compared with transformers, where xllamacpp is installed.
    """
    from trlpatch.export.gguf.export import export_gguf

    with _progress(quiet=as_json) as tell:
        done = export_gguf(
            checkpoint,
            out,
            ",".join(types),
            base=base,
            tokenizer_pre=tokenizer_pre,
            accept=accept,
            verify=not no_verify,
            progress=tell,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    # Its notes have been logged, before the work began; JSON has them again.
    _say(done if as_json else replace(done, notes=()), as_json)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done, total=of)

        yield tell


def _say(done: Exported | GgufExport, as_json: bool) -> None:
    print_json(done.to_dict()) if as_json else click.echo(str(done))
