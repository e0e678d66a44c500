"""`export_gguf`: a model with its adapter merged, as GGUF files of one or several types."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotExport
from trlpatch.export.gguf import checks
from trlpatch.export.gguf.converter_files import converter_files
from trlpatch.export.gguf.file_types import FileType, file_types
from trlpatch.export.gguf.pipe import Child
from trlpatch.export.gguf.sentencepiece_model import copy_sentencepiece
from trlpatch.export.gguf.verify import SETTINGS, Verdict, prompt, verify_files
from trlpatch.export.gguf.weights import Weights
from trlpatch.export.opening import open_source
from trlpatch.export.scratch import scratch_folder
from trlpatch.export.source import ExportSource
from trlpatch.export.space import gib, need_disk
from trlpatch.log import logger
from trlpatch.policy.adapter import base_of

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, of how many); may raise to end the export."""

CONVERSION = "trlpatch.export.gguf.conversion_child"


@dataclass(frozen=True)
class GgufFile:
    """One file that was written.

    Attributes:
        path: where it is.
        type: such as "q4_k_m".
        bytes: its size.
        verdict: what running it showed.
    """

    path: Path
    type: str
    bytes: int
    verdict: Verdict


@dataclass(frozen=True)
class GgufExport:
    """What `export_gguf` wrote.

    Attributes:
        files: in the order of `quantization_method`.
        seconds: for everything, verification included.
        notes: what the files do not carry, or compute otherwise with the user's consent.
    """

    files: tuple[GgufFile, ...]
    seconds: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{one.path}: {gib(one.bytes)}, {one.verdict}" for one in self.files]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), f"in {self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        files = [
            {"path": str(one.path), "type": one.type, "bytes": one.bytes, **asdict(one.verdict)} for one in self.files
        ]
        return {
            "files": files, "verified": self.verified, "seconds": round(self.seconds, 3), "notes": list(self.notes)
        }  # fmt: skip

    @property
    def paths(self) -> list[Path]:
        """Where the files are."""
        return [one.path for one in self.files]

    @property
    def verified(self) -> bool:
        """Has llama.cpp run every file, and agreed with transformers?"""
        return all(one.verdict.verified for one in self.files)


def export_gguf(
    source: Any,
    out: str | os.PathLike[str],
    quantization_method: str | Sequence[str] | None = "q8_0",
    *,
    tokenizer: Any = None,
    base: Any = None,
    tokenizer_pre: str | None = None,
    name: str | None = None,
    accept: Collection[str] = (),
    verify: bool = True,
    progress: Progress | None = None,
    **opening: Any,
) -> GgufExport:
    """Write a model with its adapter merged as GGUF files, from float32, in one pass over the weights.

    Args:
        source: a model in training, a checkpoint or adapter directory, a model id, or an `ExportSource`.
        out: a file ending in .gguf, or a folder; several types get their names before the suffix.
        quantization_method: "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", ..., Unsloth's
            "not_quantized", "fast_quantized" and "quantized", or a list of them.
        tokenizer: instead of the one beside the source.
        base: the checkpoint that an adapter belongs to, instead of the one that it names.
        tokenizer_pre: llama.cpp's name of the pre-tokenizer, where it does not know the tokenizer.
        name: of the model, in the metadata and in file names; the base model's by default.
        accept: names of findings that make the file compute otherwise than the model, such as "sliding_window".
        verify: run each file with llama.cpp and compare it with transformers.
        progress: called with (what is done, done, of how many).
        **opening: what `open_source` takes beside these.

    Raises:
        CannotExport: the source cannot be exported so, or there is no room; nothing was written.
        ExportMismatch: llama.cpp computes something else with a file; none of them was kept.
    """
    started = time.monotonic()
    opened = source if isinstance(source, ExportSource) else open_source(
        source, tokenizer=tokenizer, base=base, **opening
    )  # fmt: skip
    if isinstance(source, ExportSource) and (tokenizer is not None or base is not None or opening):
        raise CannotExport("export_gguf got an ExportSource; give tokenizer= and base= to open_source")
    checks.refuse_images(opened.config, opened.where)
    types = file_types(quantization_method, dtype=str(opened.dtype).removeprefix("torch."))
    named = name or Path(opened.base_name).name or "model"
    targets = _targets(Path(out).expanduser(), types, named)
    weights = Weights(opened)
    report = progress or (lambda what, done, of: None)
    with _folder(targets) as folder, scratch_folder(folder) as scratch:
        settings = scratch / SETTINGS
        settings.mkdir()
        opened.save_settings(settings)
        _name_architecture(settings, source)
        copy_sentencepiece(opened.tokenizer, opened.base_directory, settings)
        found = checks.findings(settings, weights.shapes)
        notes = [*opened.notes, *_judged(found, accept, opened.where)]
        for note in notes:
            logger.warning("GGUF: %s", note)
        files = {one.name: scratch / f"{one.name}.gguf" for one in types}
        written = _convert(opened, weights, settings, files, named, tokenizer_pre, report)
        verdicts = verify_files(
            files, written, weights, scratch, prompt(settings), unwanted=_unwanted(verify, found), report=report
        )
        for file_type in types:
            files[file_type.name].replace(targets[file_type.name])
    made = tuple(
        GgufFile(targets[one.name], one.name, targets[one.name].stat().st_size, verdicts[one.name]) for one in types
    )
    for one in made:
        logger.info("GGUF: %s, %s, %s", one.path, gib(one.bytes), one.verdict)
    return GgufExport(made, time.monotonic() - started, tuple(notes))


def _targets(out: Path, types: list[FileType], name: str) -> dict[str, Path]:
    """Return the file of each type."""
    if out.suffix != ".gguf":
        return {one.name: out / f"{name}-{one.name}.gguf" for one in types}
    if len(types) == 1:
        return {types[0].name: out}
    return {one.name: out.with_name(f"{out.stem}-{one.name}.gguf") for one in types}


@contextmanager
def _folder(targets: dict[str, Path]) -> Iterator[Path]:
    """Yield the folder of the targets, made if need be; what was made is removed when nothing comes of it."""
    folder = next(iter(targets.values())).parent
    blocked = [path for path in targets.values() if path.is_dir()]
    if blocked:
        raise CannotExport(f"writing {str(blocked[0])!r}: expected a file or nothing there, found a directory")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotExport(f"making the folder {str(folder)!r}: {error}") from error
        for one in reversed(made):
            undo.callback(_remove_empty, one)
        yield folder
        undo.pop_all()


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _judged(found: list[checks.Finding], accept: Collection[str], where: str) -> list[str]:
    """Return what to note; refuse what would compute otherwise and was not accepted."""
    asked = [accept] if isinstance(accept, str) else list(accept)
    unknown = [name for name in asked if name not in checks.ACCEPTED]
    if unknown:
        raise CannotExport(f"accept={asked}: expected names among {', '.join(checks.ACCEPTED)}, found {unknown[0]!r}")
    refused = [one for one in found if one.wrong and one.name not in asked]
    if refused:
        names = [one.name for one in refused if one.name in checks.ACCEPTED]
        raise CannotExport(
            f"exporting {where} as GGUF: llama.cpp would compute something else than this model:\n"
            + "\n".join(f"- {one.text}" for one in refused)
            + (f"\nTo export it all the same: accept={names}" if len(names) == len(refused) else "")
        )
    return [one.text for one in found]


def _name_architecture(settings: Path, source: Any) -> None:
    """Say in config.json which class the model is, where it was made of a config and never saved."""
    config = checks.settings_file(settings / "config.json")
    if not config.get("architectures") and callable(getattr(source, "named_modules", None)):
        config["architectures"] = [type(base_of(source)).__name__]
        (settings / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _unwanted(verify: bool, found: list[checks.Finding]) -> str:
    """Return why the files are not to be compared with the model; nothing where they are."""
    if not verify:
        return "verify=False"
    others = [one.name for one in found if one.wrong and one.name != checks.SLIDING_WINDOW]
    return f"accept={others}: llama.cpp computes another model on purpose" if others else ""


def _convert(
    source: ExportSource,
    weights: Weights,
    settings: Path,
    files: dict[str, Path],
    name: str,
    tokenizer_pre: str | None,
    report: Progress,
) -> dict[str, Any]:
    """Let the converter write the files; return what it says of them."""
    tools = converter_files()
    folders = [tools / "gguf-py", tools]
    with Child(CONVERSION, folders, what=f"exporting {source.where} as GGUF") as child:
        child.tell(
            {
                "shapes": {one: list(shape) for one, shape in weights.shapes.items()},
                "folder": str(settings),
                "files": {one: str(path) for one, path in files.items()},
                "name": name,
                "tokenizer_pre": tokenizer_pre,
            }
        )
        plan = child.until("plan", weights)
        need_disk(settings.parent.parent, sum(plan["sizes"].values()), ", ".join(files))
        child.tell({"write": True})
        written: dict[str, Any] = child.until(
            "written", weights, lambda done, of: report(f"writing {', '.join(files)}", done, of)
        )
    return {**written, "plan": plan}
