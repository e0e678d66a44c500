"""Export an adapter alone: PEFT's files, of a live model or without the rest of a trainer's checkpoint."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport, ExportMismatch
from trlpatch.export import places
from trlpatch.export.merged import Exported, dtype_named
from trlpatch.export.settings import save_processing
from trlpatch.export.writer import new_directory, write_report
from trlpatch.policy.adapter import base_of, lora_view

if TYPE_CHECKING:
    from torch import Tensor


def write_adapter(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    base: Any = None,
    adapter: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> Exported:
    """Write adapter_config.json, adapter_model.safetensors, the tokenizer and its chat template.

    Args:
        model: a PEFT model, a directory with an adapter (a trainer's checkpoint), or its id on the hub.
        directory: is made; an earlier export in it is replaced, anything else needs `overwrite`.
        tokenizer: None takes the one that is saved beside the adapter.
        base: what the adapter's config is to name as its base model; None leaves it.
        adapter: of a live model; None takes the active one.
        dtype: None leaves each tensor as it was trained.
        overwrite: replace the directory whatever is in it.
        token: for private adapters on the hub.

    Raises:
        CannotExport: there is no adapter, no room, or a directory that is not to be replaced. Nothing is left.
        ExportMismatch: the files hold something else than the adapter. Nothing is left.
    """
    from safetensors.torch import load_file, save_file

    started = time.monotonic()
    config, tensors, where, near = _adapter_of(model, adapter, token)
    if dtype is not None:
        wanted = dtype_named(dtype)
        tensors = {name: one.to(wanted) if one.is_floating_point() else one for name, one in tensors.items()}
    inputs = [*near, *map(Path, filter(None, [config.base_model_name_or_path]))]
    config = copy.copy(config)
    config.inference_mode = True
    if base is not None:
        config.base_model_name_or_path = os.fspath(base)
    processor = places.processor_files(tokenizer, near)
    tokenizer = places.tokenizer(tokenizer, near)
    size = sum(one.numel() * one.element_size() for one in tensors.values())
    target = Path(directory).expanduser()
    with new_directory(target, overwrite=overwrite, size=size, inputs=inputs) as place:
        config.save_pretrained(str(place))
        file = place / places.ADAPTER_WEIGHTS[0]
        save_file({name: one.contiguous() for name, one in tensors.items()}, file, metadata={"format": "pt"})
        save_processing(place, tokenizer, processor)
        _compare(load_file(file), tensors, where)
        kinds = sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()})
        verified = f"{len(tensors)} tensors, read back"
        report = {"what": "adapter", "of": where, "base": config.base_model_name_or_path, "bytes": size}
        files = write_report(place, report)
    seconds = time.monotonic() - started
    return Exported(target, ", ".join(kinds), size, seconds, files, None, verified, ())


def _adapter_of(model: Any, adapter: str | None, token: Any) -> tuple[Any, dict[str, Tensor], str, list[Path]]:
    """(its PeftConfig, its tensors by PEFT's names in files, where it is from, where its tokenizer may be)."""
    if isinstance(model, (str, os.PathLike)):
        directory = places.directory_of(model, token=token, revision=None, code=False)
        if not places.is_adapter(directory):
            raise CannotExport(
                f"exporting the adapter in {str(directory)!r}: expected {places.ADAPTER_CONFIG} there, found none; "
                "for a whole model: trlpatch export merged"
            )
        config, tensors = places.read_adapter(directory)
        return config, tensors, f"{str(directory)!r}", [directory]
    view = lora_view(model)
    base = base_of(model)
    where = f"the live {type(base).__name__}"
    if view is None:
        raise CannotExport(f"exporting the adapter of {where}: it has none; make one with peft.get_peft_model")
    name = places.one_adapter(view, adapter, where, merged=True)
    tensors = places.adapter_tensors(model, name)
    config = copy.copy(view.configs[name])
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(view.base, "name_or_path", None)
    return config, tensors, where, []


def _compare(written: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    import torch

    for name, one in tensors.items():
        if name not in written or not torch.equal(written[name], one):
            raise ExportMismatch(f"exporting the adapter of {where}: {name!r} in the file is not the adapter's")
