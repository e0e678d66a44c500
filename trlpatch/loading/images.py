"""Vision-language checkpoints: what is one, its transformers class, and its processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from trlpatch.errors import ConflictingArguments, MissingPackage
from trlpatch.loading.checkpoint import hub_has, model_class, reads
from trlpatch.loading.load_config import LoadConfig
from trlpatch.loading.tokenizer import load_tokenizer, prepared

_PACKAGES = {"PIL": "pillow", "torchvision": "torchvision"}


def read_as_images(config: LoadConfig, hf_config: Any) -> bool:
    """Is the checkpoint loaded with its vision tower and its processor?

    Raises:
        ConflictingArguments: it reads sound; or images, and is to be loaded for text alone, or with every
            weight trained beside an engine.
        MissingPackage: transformers and vLLM need a package for images that is not installed.
    """
    kinds = reads(hf_config) if config.images else []
    if not config.images:
        model_class(config, hf_config)
    if "audio" in kinds:
        raise ConflictingArguments(
            f"model_name={config.model_name!r} reads {' and '.join(kinds)} ({type(hf_config).__name__}): sound "
            "is not supported; expected a model that reads text, or text and images"
        )
    if not kinds:
        return False
    if config.full_finetuning and config.fast_inference:
        raise ConflictingArguments(
            f"full_finetuning=True, and model_name={config.model_name!r} reads images: what its vision tower made of "
            "an image stays in the engine's cache when the weights are written anew. Train an adapter, or set "
            "fast_inference=False"
        )
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(
                f"trlpatch: model_name={config.model_name!r} reads images ({type(hf_config).__name__}), for which "
                f"transformers and vLLM need {module}, which is not installed. Run: pip install {package}"
            )
    return True


def load_processor(config: LoadConfig) -> Any:
    """The processor of a checkpoint that reads images, with its tokenizer as TRL's trainers want it.

    `mm_processor_kwargs` (pixels, for one) are followed as in the engine. With `tokenizer_name` it comes from there
    where a processor was saved, as a trainer does beside an adapter; else its tokenizer alone does.
    """
    from transformers import AutoProcessor

    arguments = {**config.of_tokenizer, **(config.engine.get("mm_processor_kwargs") or {})}
    name = config.tokenizer_name
    alone = name is not None and not _has_processor(config, name)
    if name is not None and not alone:
        arguments["revision"] = None
        arguments.pop("subfolder", None)
    if arguments["revision"] is None:
        del arguments["revision"]
    place = config.model_name if name is None or alone else name
    processor = AutoProcessor.from_pretrained(place, **arguments)
    processor.tokenizer = load_tokenizer(config) if alone else prepared(processor.tokenizer)
    return processor


def tokenizer_of(processing: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself."""
    return getattr(processing, "tokenizer", processing)


def _has_processor(config: LoadConfig, name: str) -> bool:
    files = ("preprocessor_config.json", "processor_config.json")
    place = Path(name)
    if place.is_dir():
        return any((place / file).is_file() for file in files)
    cache = {"cache_dir": config.model["cache_dir"]} if "cache_dir" in config.model else {}
    return any(hub_has(name, file, token=config.token, **cache) for file in files)
