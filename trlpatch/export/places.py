"""Find what is exported: directories, models on the hub, adapters, tokenizers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.export.base import CONFIG, has_weights
from trlpatch.export.settings import has_tokenizer
from trlpatch.policy.adapter import base_of, unwrap
from trlpatch.policy.adapter_tensors import PEFT_PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.policy.adapter import LoraView

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""Either makes a directory one with a processor: transformers 4 writes the first, 5 the second."""
_BESIDE_PROCESSOR = ("video_preprocessor_config.json", "chat_template.json")


def is_adapter(directory: Path) -> bool:
    """Has it the files of a PEFT adapter?"""
    return (directory / ADAPTER_CONFIG).is_file()


def directory_of(name: Any, *, token: Any, revision: str | None, code: bool) -> Path:
    """The directory of this path or model id; what is on the hub only is downloaded.

    Raises:
        CannotExport: there is no such directory, and no such model that can be reached.
    """
    text = os.fspath(name)
    place = Path(text).expanduser()
    if place.is_dir():
        return place
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text or place.is_file():
        found = "a file" if place.is_file() else "nothing"
        raise CannotExport(
            f"reading {text!r}: expected a directory or a model id on the hub, found {found} there; give another, or "
            "name the base model with base="
        )
    from huggingface_hub import snapshot_download

    code_files = ["*.py"] if code else []
    for weights in ("*.safetensors", "*.bin"):
        try:
            found_in = snapshot_download(
                text, revision=revision, token=token, allow_patterns=[*_SETTINGS, *code_files, weights]
            )
        except Exception as error:  # a dozen classes of huggingface_hub, httpx and requests
            raise CannotExport(
                f"reading {text!r}: no such directory, and the hub has no such model in reach: {error}; check the "
                "spelling and the network, pass token= for a private model, or give a directory with base="
            ) from error
        if has_weights(Path(found_in)) or is_adapter(Path(found_in)):
            break
    return Path(found_in)


def read_adapter(directory: Path) -> tuple[Any, dict[str, Tensor]]:
    """(its PeftConfig, its tensors by the names that files have)."""
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file

    path = next((directory / name for name in ADAPTER_WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise CannotExport(
            f"reading the adapter in {str(directory)!r}: expected {' or '.join(ADAPTER_WEIGHTS)}, found neither"
        )
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if path.suffix == ".safetensors":
            return config, load_file(path)
        return config, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle have classes of their own for a file that is cut short
        raise CannotExport(f"reading the adapter in {str(directory)!r}: {error}; copy or save it again") from error


def adapter_tensors(model: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter of a live model by the names that PEFT's files have, on the CPU."""
    from peft import get_peft_model_state_dict

    holder = unwrap(model)
    if not isinstance(getattr(holder, "peft_config", None), dict):
        # Asked through the model inside: it is not known which PEFT model is around it.
        holder = base_of(model)
    found = get_peft_model_state_dict(holder, adapter_name=adapter, save_embedding_layers=False)
    return {f"{PEFT_PREFIX}{key.removeprefix(PEFT_PREFIX)}": one.detach().cpu() for key, one in found.items()}


def nothing_in(directory: Path) -> str:
    """The message for a directory that holds nothing to export."""
    steps = sorted(directory.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    adapters = sorted(path.parent for path in directory.glob(f"*/{ADAPTER_CONFIG}"))  # PEFT saves named ones so
    what, found = ("checkpoints", steps) if steps else ("adapters", adapters)
    hint = f"; it holds {len(found)} {what}: give {str(found[-1])!r}, for one" if found else ""
    return (
        f"exporting {str(directory)!r}: expected {ADAPTER_CONFIG} with an adapter, or {CONFIG} with weights, found "
        f"neither{hint}"
    )


def refuse_quantized(config: Any, directory: Path) -> None:
    """Raise CannotExport for a base whose files are quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = getattr(method, "value", method)
    raise CannotExport(
        f"reading the base weights in {str(directory)!r}: they are quantized ({method}), and merging "
        "into them would keep their error; expected the 16-bit checkpoint that they were made from: name it "
        "with base="
    )


def is_quantized(model: Any) -> bool:
    """Are weights of this live model quantized?"""
    return bool(
        getattr(model.config, "quantization_config", None)
        or getattr(model, "is_loaded_in_4bit", False)
        or getattr(model, "is_loaded_in_8bit", False)
    )


def one_adapter(view: LoraView, name: str | None, where: str, *, merged: bool = False) -> str:
    """The adapter to export: `name`, else the active one. `merged`: whether one may be merged into the base.

    Raises:
        CannotExport: there is none of that name, several are active, or one is merged into the base weights.
    """
    if name is not None and name not in view.configs:
        raise CannotExport(f"exporting {where}: adapter={name!r}: this model has {', '.join(view.configs)}")
    active = view.active or tuple(view.configs)
    if name is None and len(active) != 1:
        raise CannotExport(
            f"exporting {where}: {len(active)} adapters are active ({', '.join(active)}); name one with adapter=, or "
            "combine them first: model.add_weighted_adapter(...)"
        )
    if view.merged and not merged:
        raise CannotExport(
            f"exporting {where}: an adapter is merged into its base weights already, which would count twice; call "
            "model.unmerge_adapter() first"
        )
    return name or active[0]


def generation_config(directory: Path | None) -> Any:
    """The generation config saved in a directory, or None."""
    from transformers import GenerationConfig

    if directory is None or not (directory / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(directory)


def tokenizer(given: Any, directories: list[Path]) -> Any:
    """The tokenizer that was given, else that of the first directory that has one, or None."""
    from transformers import AutoTokenizer

    if given is not None:
        if not callable(getattr(given, "save_pretrained", None)):
            raise CannotExport(
                f"tokenizer={given!r}: expected a tokenizer or processor of transformers, or None for the one beside "
                "the model's files"
            )
        return given
    for directory in directories:
        if directory.is_dir() and has_tokenizer(directory):
            return AutoTokenizer.from_pretrained(directory)
    return None


def processor_files(given: Any, directories: list[Path]) -> tuple[Path, ...]:
    """The files that a processor has beside its tokenizer, of the first directory that has one.

    None where `given` is a processor, which saves its own. They are copied as they are: transformers makes no
    processor of them without torchvision, and a merge changes nothing that they say.
    """
    if hasattr(given, "image_processor"):
        return ()
    for directory in directories:
        if any((directory / name).is_file() for name in _PROCESSOR):
            names = (*_PROCESSOR, *_BESIDE_PROCESSOR)
            return tuple(directory / name for name in names if (directory / name).is_file())
    return ()


def reads_images(config: Any) -> bool:
    """Has a model of this config a vision tower?"""
    return getattr(config, "vision_config", None) is not None
