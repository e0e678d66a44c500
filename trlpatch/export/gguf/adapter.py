"""`export_adapter_gguf`: a LoRA adapter alone, for llama.cpp to add to a GGUF of its base model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.export import places
from trlpatch.export.adapter_files import write_adapter
from trlpatch.export.gguf.checks import refuse_images
from trlpatch.export.gguf.converter_files import converter_files
from trlpatch.export.gguf.export import GgufExport, GgufFile
from trlpatch.export.gguf.pipe import child_environment
from trlpatch.export.gguf.verify import Verdict, verify_adapter
from trlpatch.export.gguf.weights import Weights
from trlpatch.export.opening import open_source
from trlpatch.export.scratch import scratch_folder
from trlpatch.policy.adapter import base_of
from trlpatch.policy.lora_support import REWRITES_BASE

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("f32", "f16", "bf16", "q8_0")


def export_adapter_gguf(
    source: Any,
    out: str | os.PathLike[str],
    outtype: str = "f32",
    *,
    base: Any = None,
    adapter: str | None = None,
    base_gguf: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> GgufExport:
    """Write a LoRA adapter as a GGUF file: `llama-cli -m BASE.gguf --lora OUT.gguf`.

    llama.cpp scales every layer by alpha / rank, with one alpha. What rsLoRA, `alpha_pattern` and `rank_pattern` make
    of that is multiplied into B, in float32.

    Args:
        source: a PEFT model, or a directory with an adapter.
        out: the file, ending in .gguf.
        outtype: "f32", "f16", "bf16" or "q8_0".
        base: the base model, of which only the config is read, instead of the one that the adapter names.
        adapter: of a live model; None takes the active one.
        base_gguf: an f32 GGUF of the base, to run the adapter on it and compare with transformers.
        token: for private adapters on the hub.

    Raises:
        CannotExport: DoRA, modules_to_save, trained biases or tokens: nothing of it fits into a LoRA file; a base
            model that reads images.
        ExportMismatch: with `base_gguf`, llama.cpp computes something else; the file was not kept.
    """
    started = time.monotonic()
    target = Path(out).expanduser()
    if target.suffix != ".gguf" or target.is_dir():
        raise CannotExport(f"writing {str(target)!r}: expected a file ending in .gguf")
    if outtype not in TYPES:
        raise CannotExport(
            f"outtype={outtype!r}: expected one of {', '.join(TYPES)}; llama.cpp has no mixes for adapters"
        )
    if not target.parent.is_dir():
        raise CannotExport(f"writing {str(target)!r}: expected its folder to be there; make it first")
    tools = converter_files()
    with scratch_folder(target.parent) as scratch:
        folder, made = scratch / "adapter", scratch / "adapter.gguf"
        write_adapter(source, folder, base=base, adapter=adapter, token=token)
        fold_scales(folder, saved=isinstance(source, (str, os.PathLike)))
        settings = scratch / "base"
        _base_config(source, folder, settings, token)
        _run(tools, [str(folder), "--base", str(settings), "--outfile", str(made), "--outtype", outtype])
        verdict = Verdict(False, note="an adapter runs on a GGUF of its base: base_gguf=, of type f32")
        if base_gguf is not None:
            merged = open_source(source, base=base, adapter=adapter, token=token)
            verdict = verify_adapter(made, Path(base_gguf), Weights(merged), settings, scratch)
        made.replace(target)
    made_file = GgufFile(target, outtype, target.stat().st_size, verdict)
    return GgufExport((made_file,), time.monotonic() - started, ())


def fold_scales(folder: Path, *, saved: bool = True) -> None:
    """Rewrite a saved adapter so that alpha / rank of each layer is its scale, with one alpha for all of them.

    Raises:
        CannotExport: the adapter has more than A and B.
    """
    from safetensors.torch import load_file, save_file

    path = folder / places.ADAPTER_CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    weights = folder / places.ADAPTER_WEIGHTS[0]
    tensors = load_file(weights)
    _refuse(config, tensors, saved=saved)
    alpha = float(config["lora_alpha"])
    for name, tensor in tensors.items():
        if _part(name) != "B":
            continue
        rank = tensor.shape[-1]
        factor = _scale(config, _module(name), rank) * rank / alpha
        if factor != 1.0:
            tensors[name] = tensor.float() * factor
    save_file({name: one.contiguous() for name, one in tensors.items()}, weights, metadata={"format": "pt"})
    config |= {"use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _part(name: str) -> str | None:
    """Return "A" or "B"."""
    return next((part for part in "AB" if f".lora_{part}.weight" in name or f".lora_embedding_{part}" in name), None)


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_")[0]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what PEFT multiplies B A by in a module."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _refuse(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, saved: bool) -> None:
    init = config.get("init_lora_weights")
    rewrites = saved and isinstance(init, str) and init.lower().startswith(REWRITES_BASE)
    reasons = {
        "DoRA": config.get("use_dora"),
        f"modules_to_save={config.get('modules_to_save')}": config.get("modules_to_save"),
        f"bias={config.get('bias')!r}": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "trainable_token_indices": config.get("trainable_token_indices"),
        "target_parameters": config.get("target_parameters"),
        f"init_lora_weights={init!r}, which changed the base": rewrites,
        "layer_replication": config.get("layer_replication"),
    }
    found = [reason for reason, there in reasons.items() if there]
    found += [repr(name) for name in tensors if _part(name) is None][:1]
    if config.get("peft_type", "LORA") != "LORA":
        found.append(str(config["peft_type"]))
    if not found and float(config["lora_alpha"]) == 0:
        found.append("lora_alpha=0")
    if found:
        raise CannotExport(
            f"exporting an adapter as GGUF: llama.cpp's LoRA files hold A and B of each layer, and this one has "
            f"{', '.join(found)}. Export the merged model: export_gguf"
        )


def _base_config(source: Any, folder: Path, settings: Path, token: str | bool | None) -> None:
    """Write the config of the base model, which is all that the converter reads of it."""
    if not isinstance(source, (str, os.PathLike)):
        model = base_of(source)
        config = copy.copy(model.config)
        config.architectures = config.architectures or [type(model).__name__]  # saving a model sets it
    else:
        from transformers import AutoConfig

        name = json.loads((folder / places.ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not name:
            raise CannotExport("exporting an adapter as GGUF: it names no base model; name it with base=")
        config = AutoConfig.from_pretrained(places.directory_of(name, token=token, revision=None, code=False))
    refuse_images(config, "an adapter")
    settings.mkdir()
    config.save_pretrained(settings)


def _run(tools: Path, arguments: list[str]) -> None:
    """Run convert_lora_to_gguf.py."""
    command = [sys.executable, str(tools / "convert_lora_to_gguf.py"), *arguments]
    done = subprocess.run(
        command, env=child_environment([tools / "gguf-py"]), check=False, capture_output=True, text=True
    )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise CannotExport(
            f"exporting an adapter as GGUF: convert_lora_to_gguf.py ended with status {done.returncode}. What it said "
            f"last:\n{said}"
        )
