"""Unsloth's names for exports: functions for any PEFT or transformers model, and methods put on loaded ones."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import tempfile
import types
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
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

    from trlpatch.export.gguf.export import GgufExport

_METHODS = ("merged_16bit", "merged_4bit", "lora")
_ALIASES = {"merged_4bit_forced": "merged_4bit"}
_NEUTRAL = frozenset({
    "save_function", "save_peft_format", "tags", "temporary_location", "maximum_memory_usage", "datasets", "variant",
    "state_dict", "safe_serialization", "use_temp_dir", "max_shard_size",
})  # fmt: skip
"""What Unsloth's scripts pass on, and nothing here depends on."""
_OPENING = ("base", "adapter", "revision", "trust_remote_code")
_MERGED = (*_OPENING, "dtype", "overwrite", "verify", "progress")
_GGUF = (*_OPENING, "accept", "name", "tokenizer_pre", "verify", "progress")


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
    private = kwargs.pop("private", None)
    options = _options("save_pretrained_merged", kwargs, _MERGED)
    method = _method(save_method)
    done = _write(model, save_directory, tokenizer, method, token, max_shard_size, options)
    logger.info("%s: %s in %.1f s, %s", done.directory, f"{done.bytes:,} bytes", done.seconds, done.verified)
    for note in done.notes:
        logger.log(logging.WARNING if done.lossy else logging.INFO, "%s: %s", done.directory, note)
    if push_to_hub:
        repo_id = os.fspath(save_directory)
        kept = f"the export is complete in {str(done.directory)!r}"
        _upload(_repository(repo_id, token, private, kept=kept), done.directory, None, token, {})
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

    The repository is made first: without a token or a network nothing is exported in vain. The files are compared with
    the model before they are uploaded. They are written into a temporary directory (TMPDIR says where), and stay there
    when the upload fails.

    Raises:
        CannotExport: as `save_pretrained_merged`, and with what the hub says.
    """
    commit = {"create_pr": create_pr, "revision": revision, "commit_message": commit_message}
    commit["commit_description"] = kwargs.pop("commit_description", None)
    options = _options("push_to_hub_merged", kwargs, _MERGED)
    method = _method(save_method)

    def write(directory: Path) -> None:
        _write(model, directory, tokenizer, method, token, max_shard_size, options)

    return _push(write, repo_id, token, private, commit)


def save_pretrained_gguf(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    first_conversion: str | None = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> GgufExport | None:
    """Write GGUF files of the model with its adapter merged, and run them: `trlpatch.export.gguf.export_gguf`.

    Args:
        model: PEFT or transformers, in training or not; also a checkpoint's or an adapter's directory.
        save_directory: a folder, or for one file its name ending in .gguf; with `push_to_hub` the repository's id too.
        tokenizer: None takes the one beside the model's files.
        quantization_method: "q8_0", "q4_k_m", "f16", ..., or a list of them.
        first_conversion: has no effect: every type is made from the float32 merge.
        push_to_hub: upload the files that were written, too.
        token: of the hub.
        private: of a repository that is made.
        is_main_process: False does nothing and returns None, for other ranks.
        **kwargs: `base`, `adapter`, `accept`, `name`, `tokenizer_pre`, `verify`, `progress`, `revision`,
            `trust_remote_code`, as in export_gguf. Those of Unsloth's that have no meaning here are left alone.

    Raises:
        CannotExport: with the reason; nothing was written.
        ExportMismatch: llama.cpp computes something else with a file; none of them was kept.
        UnknownArgument: an argument that nobody knows.
    """
    if not is_main_process:
        return None
    options = _options("save_pretrained_gguf", kwargs, _GGUF)
    done = _gguf(model, save_directory, tokenizer, quantization_method, first_conversion, token, options)
    if push_to_hub:
        folder = done.paths[0].parent
        kept = f"the files are complete in {str(folder)!r}"
        repository = _repository(os.fspath(save_directory), token, private, kept=kept)
        _upload(repository, folder, [path.name for path in done.paths], token, {})
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
    """Write GGUF files and upload them; the address of the commit. Everything else as in `push_to_hub_merged`."""
    commit = {"create_pr": create_pr, "revision": revision, "commit_message": commit_message}
    commit["commit_description"] = kwargs.pop("commit_description", None)
    options = _options("push_to_hub_gguf", kwargs, _GGUF)

    def write(directory: Path) -> None:
        _gguf(model, directory, tokenizer, quantization_method, first_conversion, token, options)

    return _push(write, repo_id, token, private, commit)


ATTACHED: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (save_pretrained_merged, push_to_hub_merged, save_pretrained_gguf, push_to_hub_gguf)
}


def attach_export(model: Module) -> None:
    """Give a model the export methods. PEFT models pass on what is on the transformers model in them."""
    for name, function in ATTACHED.items():
        setattr(model, name, types.MethodType(function, model))


def _method(name: Any) -> str:
    found = str(name).strip().lower().replace(" ", "_")
    found = _ALIASES.get(found, found)
    if found not in _METHODS:
        raise CannotExport(f"save_method={name!r}: expected {', '.join(map(repr, _METHODS))}")
    return found


def _options(call: str, kwargs: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    if kwargs.get("state_dict") is not None:
        raise CannotExport(f"{call}: state_dict= is not followed: weights are read from the model; leave it out")
    if kwargs.get("safe_serialization", True) is False:
        raise CannotExport(
            f"{call}: safe_serialization=False writes pickles; only safetensors are written; leave it out"
        )
    for name in kwargs:
        if name not in _NEUTRAL and name not in known:
            raise UnknownArgument(f"{call}: {name}= is not an argument of it; expected {', '.join(sorted(known))}")
    return {name: value for name, value in kwargs.items() if name in known}


def _write(
    model: Any, directory: Any, tokenizer: Any, method: str, token: Any, max_shard_size: Any, options: dict[str, Any]
) -> Exported:
    options, token = dict(options), _token(token)
    if method == "lora":
        if options.get("revision") is not None:
            raise CannotExport(
                'save_method="lora": revision= is of a base model, and none is read; leave it out, or download the '
                "adapter of that revision and give its directory"
            )
        kept = {name: options[name] for name in ("base", "adapter", "dtype", "overwrite") if name in options}
        return write_adapter(model, directory, tokenizer=tokenizer, token=token, **kept)
    opening = {name: options.pop(name) for name in _OPENING if name in options}
    source = open_source(model, tokenizer=tokenizer, token=token, **opening)
    write = write_four_bit if method == "merged_4bit" else write_merged
    return write(source, directory, max_shard_size=max_shard_size, **options)


def _gguf(
    model: Any, directory: Any, tokenizer: Any, method: Any, first: str | None, token: Any, options: dict[str, Any]
) -> GgufExport:
    from trlpatch.export.gguf.export import export_gguf

    if first is not None:
        logger.info("first_conversion=%r has no effect: every type is made from the float32 merge", first)
    return export_gguf(model, directory, method, tokenizer=tokenizer, token=_token(token), **options)


def _push(write: Callable[[Path], None], repo_id: str, token: Any, private: bool | None, commit: Any) -> str:
    """Upload what `write` makes; it goes afterwards, unless the upload fails."""
    repository = _repository(repo_id, token, private, kept="nothing was exported")
    with ExitStack() as stack:
        parent = Path(tempfile.mkdtemp(prefix="trlpatch-"))
        stack.callback(shutil.rmtree, parent, ignore_errors=True)
        write(parent / "export")
        try:
            return _upload(repository, parent / "export", None, token, commit)
        except CannotExport:
            stack.pop_all()
            raise


def _token(token: Any) -> Any:
    """What Unsloth's notebooks leave empty (token="") is the token that this machine is logged in with."""
    return None if token == "" else token


def _repository(repo_id: str, token: Any, private: bool | None, *, kept: str) -> str:
    """The repository's whole id; it is made where it is not there."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi(token=_token(token)).create_repo(repo_id, private=private, exist_ok=True).repo_id)
    except Exception as error:  # a dozen classes of huggingface_hub, httpx and requests
        raise CannotExport(
            f"making the repository {repo_id!r} on the hub: {error}; {kept}; log in (hf auth login) or pass token= of "
            "an account that may write there, and check the name (account/model) and the network"
        ) from error


def _upload(repository: str, directory: Path, files: list[str] | None, token: Any, commit: dict[str, Any]) -> str:
    """Upload the files, or all of the directory; the address of the commit."""
    from huggingface_hub import HfApi

    kept = {name: value for name, value in commit.items() if value is not None}
    try:
        return str(
            HfApi(token=_token(token)).upload_folder(
                repo_id=repository, folder_path=str(directory), allow_patterns=files, **kept
            )
        )
    except Exception as error:  # as above
        raise CannotExport(
            f"uploading to {repository!r}: {error}; the export is complete in {str(directory)!r}: upload it with "
            f"hf upload {repository} {shlex.quote(str(directory))}"
        ) from error
