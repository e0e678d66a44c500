"""Export merged weights in bitsandbytes' nf4: merged from the 16-bit base, rounded to 16 bits, then quantized once."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trlpatch.errors import CannotExport
from trlpatch.export.merged import Exported, default_dtype, write_merged
from trlpatch.export.skeleton import model_class
from trlpatch.export.source import ExportSource
from trlpatch.export.writer import new_directory, write_report

_INSTALL = 'pip install "bitsandbytes>=0.48.1"'


def require_bitsandbytes() -> None:
    """Raise CannotExport where nothing can quantize."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CannotExport(
            'save_method="merged_4bit": bitsandbytes quantizes, and it is not installed; nothing was written; install '
            f'it ({_INSTALL}), or export in 16 bits (save_method="merged_16bit") and let the loader quantize'
        )


def write_four_bit(
    source: ExportSource,
    directory: str | Path,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool | str = True,
    progress: Any = None,
) -> Exported:
    """As `write_merged`, and then quantized as `from_pretrained(load_in_4bit=True)` does: nf4, double quantization.

    The merged weights are written and compared in 16 bits first, in a directory that goes again. What nf4 makes of the
    adapter's change is not compared with anything: its steps are some hundred times those of bfloat16.

    Raises:
        CannotExport: bitsandbytes is not installed or fails, and what `write_merged` raises. Nothing is left.
    """
    require_bitsandbytes()
    import torch
    import transformers

    started = time.monotonic()
    target = Path(directory).expanduser()
    size = source.size(default_dtype(source))
    with new_directory(target, overwrite=overwrite, size=size + size // 2, inputs=source.inputs) as place:
        done = write_merged(
            source, place / "merged", dtype=dtype, max_shard_size=max_shard_size, verify=verify, progress=progress
        )
        compute = getattr(torch, done.dtype)
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
        )
        try:
            model = model_class(source.config).from_pretrained(
                place / "merged", quantization_config=settings, device_map={"": _device()},
                trust_remote_code=source.trust_remote_code,
            )  # fmt: skip
            model.save_pretrained(place, max_shard_size=max_shard_size)
        except Exception as error:  # of bitsandbytes, transformers and torch, each its own
            raise CannotExport(
                f'save_method="merged_4bit" of {source.where}: bitsandbytes failed: {error}; nothing was written; '
                'export in 16 bits (save_method="merged_16bit") and let the loader quantize'
            ) from error
        shutil.rmtree(place / "merged")
        source.save_tokenizer(place)
        note = "quantized to nf4 after the merge; what 4 bits keep of the adapter was not measured"
        report = {"what": "merged weights", "of": source.where, "dtype": "nf4", "notes": [*done.notes, note]}
        files = write_report(place, report)
        written = sum(one.stat().st_size for one in place.glob("*.safetensors"))
    seconds = time.monotonic() - started
    return replace(
        done, directory=target, dtype="nf4", bytes=written, seconds=seconds, files=files, notes=(*done.notes, note)
    )


def _device() -> Any:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
