"""Unsloth's names for exports: functions for any PEFT or transformers model, and methods put on loaded ones."""

from __future__ import annotations

import logging
import os
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport, UnknownArgument
from trlpatch.export.adapter_files import write_adapter
from trlpatch.export.four_bit import write_four_bit
from trlpatch.export.merged import Exported, write_merged
from trlpatch.export.opening import open_source
from trlpatch.log import logger

if TYPE_CHECKING:
    from torch.nn import Module

_METHODS = ("merged_16bit", "merged_4bit", "lora")
_ALIASES = {"merged_4bit_forced": "merged_4bit"}
_NEUTRAL = frozenset(
    {"save_function", "save_peft_format", "tags", "temporary_location", "maximum_memory_usage", "datasets", "variant"}
)
"""What Unsloth's scripts pass on, and nothing here depends on."""


def save_pretrained_merged(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    is_main_process: bool = True,
    max_shard_size: int | str = "5GB",
    **kwargs: Any,
) -> Exported | None:
    """Write the model with its adapter merged, or the adapter alone, into a directory.

    Args:
        model: PEFT or transformers, in training or not; also a checkpoint's or an adapter's directory. It stays as it
            is: nothing is merged into it.
        save_directory: is complete at the end or not there; with `push_to_hub` the repository's id as well.
        tokenizer: None takes the one beside the model's files.
        save_method: "merged_16bit"; "merged_4bit" (merged in 16 bits, then bitsandbytes nf4); "lora".
        push_to_hub: upload it, too.
        token: of the hub.
        is_main_process: False does nothing and returns None, for other ranks.
        max_shard_size: bytes of a file, or "5GB".
        **kwargs: `dtype` ("bfloat16", "float16", "float32"; None: the base's 16-bit one), `base` (the 16-bit base, for
            adapters and 4-bit models that do not name it), `adapter`, `overwrite`, `verify`, `progress`, `revision`,
            `trust_remote_code`, as in trlpatch.export.merged.write_merged. Those of Unsloth's that have no meaning
            here are left alone.

    Raises:
        CannotExport: with the reason; nothing was written.
        ExportMismatch: what was written differs from the model; it was removed.
        UnknownArgument: an argument that nobody knows.
    """
    if not is_main_process:
        return None
    options = _options("save_pretrained_merged", kwargs)
    method = _method(save_method)
    done = _write(model, save_directory, tokenizer, method, token, max_shard_size, options)
    logger.info("%s: %s in %.1f s, %s", done.directory, f"{done.bytes:,} bytes", done.seconds, done.verified)
    for note in done.notes:
        logger.log(logging.WARNING if done.lossy else logging.INFO, "%s: %s", done.directory, note)
    if push_to_hub:
        _upload(done.directory, os.fspath(save_directory), token)
    return done


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    use_temp_dir: bool | None = None,
    commit_message: str = "Export with trlpatch",
    private: bool | None = None,
    token: str | bool | None = None,
    max_shard_size: int | str = "5GB",
    create_pr: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> str:
    """Export as `save_pretrained_merged` does and upload it; the address of the commit.

    The files are compared with the model before anything is uploaded. They are written into a temporary directory:
    TMPDIR says where.
    """
    description = kwargs.pop("commit_description", None)
    options = _options("push_to_hub_merged", kwargs)
    method = _method(save_method)
    with tempfile.TemporaryDirectory(prefix="trlpatch-") as parent:
        done = _write(model, Path(parent) / "export", tokenizer, method, token, max_shard_size, options)
        return _upload(
            done.directory, repo_id, token, private=private, commit_message=commit_message, create_pr=create_pr,
            revision=revision, commit_description=description,
        )  # fmt: skip


def save_pretrained_gguf(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    first_conversion: str | None = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> Any:
    """Write GGUF files of the model with its adapter merged: `trlpatch.export.gguf.export_gguf`."""
    if not is_main_process:
        return None
    done = _gguf(model, save_directory, tokenizer, quantization_method, first_conversion, token, kwargs)
    if push_to_hub:
        _upload(Path(save_directory), os.fspath(save_directory), token)
    return done


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    first_conversion: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Export with trlpatch",
    create_pr: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> str:
    """Write GGUF files into a temporary directory and upload them; the address of the commit."""
    description = kwargs.pop("commit_description", None)
    kwargs.pop("use_temp_dir", None)
    with tempfile.TemporaryDirectory(prefix="trlpatch-") as parent:
        directory = Path(parent) / repo_id.rpartition("/")[2]
        _gguf(model, directory, tokenizer, quantization_method, first_conversion, token, kwargs)
        return _upload(
            directory, repo_id, token, private=private, commit_message=commit_message, create_pr=create_pr,
            revision=revision, commit_description=description,
        )  # fmt: skip


ATTACHED: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (save_pretrained_merged, push_to_hub_merged, save_pretrained_gguf, push_to_hub_gguf)
}


def attach_export(model: Module) -> None:
    """Give a model the export methods. PEFT models pass on what is on the transformers model in them."""
    for name, function in ATTACHED.items():
        setattr(model, name, types.MethodType(function, model))


def _method(name: str) -> str:
    found = _ALIASES.get(name, name)
    if found not in _METHODS:
        raise CannotExport(f"save_method={name!r}: expected {', '.join(map(repr, _METHODS))}")
    return found


def _options(call: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    known = {
        "dtype", "base", "adapter", "overwrite", "verify", "progress", "revision", "trust_remote_code",
    }  # fmt: skip
    options = {name: value for name, value in kwargs.items() if name in known}
    if kwargs.get("state_dict") is not None:
        raise CannotExport(f"{call}: state_dict= is not followed: weights are read from the model; leave it out")
    if kwargs.get("safe_serialization", True) is False:
        raise CannotExport(
            f"{call}: safe_serialization=False writes pickles; only safetensors are written; leave it out"
        )
    for name in kwargs:
        if name not in known | _NEUTRAL | {"state_dict", "safe_serialization", "use_temp_dir"}:
            raise UnknownArgument(f"{call}: {name}= is not an argument of it; expected {', '.join(sorted(known))}")
    return options


def _write(
    model: Any, directory: Any, tokenizer: Any, method: str, token: Any, max_shard_size: Any, options: dict[str, Any]
) -> Exported:
    options = dict(options)
    if method == "lora":
        kept = {name: options[name] for name in ("base", "adapter", "dtype", "overwrite") if name in options}
        return write_adapter(model, directory, tokenizer=tokenizer, token=token, **kept)
    opening = {
        name: options.pop(name) for name in ("base", "adapter", "revision", "trust_remote_code") if name in options
    }
    source = open_source(model, tokenizer=tokenizer, token=token, **opening)
    write = write_four_bit if method == "merged_4bit" else write_merged
    return write(source, directory, max_shard_size=max_shard_size, **options)


def _gguf(
    model: Any, directory: Any, tokenizer: Any, method: Any, first: str | None, token: Any, kwargs: dict[str, Any]
) -> Any:
    from importlib import import_module

    if first is not None:
        logger.info("first_conversion=%r has no effect: every type is made from the float32 merge", first)
    neutral = {*_NEUTRAL, "state_dict", "safe_serialization", "max_shard_size"}
    options = {name: value for name, value in kwargs.items() if name not in neutral}
    export_gguf: Any = import_module("trlpatch.export.gguf").export_gguf
    return export_gguf(model, directory, method, tokenizer=tokenizer, token=token, **options)


def _upload(directory: Path, repo_id: str, token: Any, *, private: bool | None = None, **commit: Any) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    kept = {name: value for name, value in commit.items() if value is not None}
    return str(api.upload_folder(repo_id=repo, folder_path=str(directory), **kept))
