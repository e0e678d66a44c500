"""The checkpoint before its weights are read: is it there, what is it, how large, and does vLLM adapt it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trlpatch.errors import ConflictingArguments, LoraNotSupported, ModelNotFound
from trlpatch.loading.load_config import LoadConfig
from trlpatch.loading.memory import weight_bytes


def read_hf_config(config: LoadConfig) -> Any:
    """The checkpoint's transformers config.

    Raises:
        ModelNotFound: the directory does not exist or holds no model; the hub does not know the id, or it cannot be
            reached and the model is not in its cache.
        ConflictingArguments: load_in_4bit for a checkpoint that is quantized in another way, full_finetuning for one
            that is quantized.
    """
    from transformers import AutoConfig

    given = config.model.get("config")
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    subfolder = str(config.model.get("subfolder") or "")
    if subfolder and config.fast_inference:
        raise ConflictingArguments(
            f"model_name={config.model_name!r}, subfolder={subfolder!r}: vLLM loads no model from a subfolder. Give "
            f"the directory itself (of a hub model: its download), {str(Path(config.model_name, subfolder))!r}, or "
            "set fast_inference=False"
        )
    _require_directory(config.model_name, subfolder)
    try:
        hf_config = AutoConfig.from_pretrained(given or config.model_name, **config.of_tokenizer)
    except OSError as error:
        raise ModelNotFound(_not_found(config, error)) from error
    _require_one_quantization(config, hf_config)
    if "attn_implementation" in config.model:  # a model over the engine's weights is built from the config alone
        hf_config._attn_implementation = config.model["attn_implementation"]
    return hf_config


def require_length(config: LoadConfig, hf_config: Any) -> None:
    """See that the model has as many positions as are asked for, before vLLM is imported.

    Asks no more than vLLM (`_get_and_verify_max_len`, vllm/config/model.py), and what that may allow is left to it:
    scaled positions, lengths of other names, and what the user overrides.

    Raises:
        ConflictingArguments: `max_seq_length` is above the checkpoint's `max_position_embeddings`.
    """
    text = hf_config.get_text_config()
    has = getattr(text, "max_position_embeddings", None)
    overridden = "hf_overrides" in config.engine or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    if not config.fast_inference or overridden or not isinstance(has, int) or config.max_seq_length <= has:
        return
    if _scales_positions(text) or getattr(text, "model_max_length", None):
        return
    raise ConflictingArguments(
        f"FastLanguageModel.from_pretrained: max_seq_length={config.max_seq_length}, and {config.model_name} was made "
        f"for {has} tokens (max_position_embeddings in its config.json), prompt and completion together. Set "
        f"max_seq_length={has} or less, or scale its positions with hf_overrides={{'rope_scaling': ...}}"
    )


def _scales_positions(text: Any) -> bool:
    # transformers 5 has `rope_parameters`, always, and of some models one for each kind of layer.
    for given in (getattr(text, "rope_scaling", None), getattr(text, "rope_parameters", None)):
        if isinstance(given, Mapping):
            every = [given, *(one for one in given.values() if isinstance(one, Mapping))]
            if any("factor" in one or one.get("rope_type", one.get("type")) not in (None, "default") for one in every):
                return True
    return False


def hub_has(name: str, file: str, **arguments: Any) -> bool:
    """Has the repository, or its copy in the cache, the file? What cannot be asked is answered by the load itself.

    `arguments` are huggingface_hub's: revision, subfolder, token, cache_dir, ...
    """
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, file, **arguments)
    except (OSError, ValueError):
        return False
    return True


def _require_directory(name: str, subfolder: str) -> None:
    """Refuse paths that are no model directory before the hub is asked for a repository of that name."""
    place = Path(name).expanduser()
    if place.is_dir():
        if (place / subfolder / "config.json").is_file():
            return
        where = f"its subfolder {subfolder!r}" if subfolder else "it"
        raise ModelNotFound(f"model_name={name!r}: expected a directory with config.json, found none in {where}")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_a_path or place.is_file():
        found = "a file" if place.is_file() else "nothing"
        raise ModelNotFound(f"model_name={name!r}: expected a directory with config.json, found {found} there")


def _not_found(config: LoadConfig, error: OSError) -> str:
    from huggingface_hub import constants, errors

    name, cause = config.model_name, error.__cause__
    where = f"model_name={name!r}" + (f", revision={config.revision!r}" if config.revision else "")
    if isinstance(cause, errors.GatedRepoError):
        return f"{where}: the model is gated; accept its terms on the hub, and pass token= or run `hf auth login`"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"{where}: no such directory here, and no such model on the hub; check the spelling. A private model "
            "needs token= or `hf auth login`"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{where}: the model has no such revision"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{where}: no such directory here, the model is not in the hub's cache, and HF_HUB_OFFLINE is set; unset "
            "it, or give the directory of a downloaded model"
        )
    if isinstance(cause, errors.LocalEntryNotFoundError):
        return (
            f"{where}: no such directory here, not in the hub's cache, and the hub cannot be reached; check the "
            "network, or give the directory of a downloaded model"
        )
    return f"{where}: {error}"


def reads(hf_config: Any) -> list[str]:
    """What the model reads beside text, of "vision" and "audio"."""
    return [kind for kind in ("vision", "audio") if getattr(hf_config, f"{kind}_config", None) is not None]


def model_class(config: LoadConfig, hf_config: Any) -> Any:
    """Transformers' class that loads the checkpoint: with its vision tower where images are asked for.

    Raises ConflictingArguments where transformers has none for text alone.
    """
    import transformers

    causal = transformers.AutoModelForCausalLM
    if "vision" not in reads(hf_config):
        return causal
    if config.images:
        return transformers.AutoModelForImageTextToText
    if type(hf_config) not in causal._model_mapping and "AutoModelForCausalLM" not in getattr(
        hf_config, "auto_map", {}
    ):
        raise ConflictingArguments(
            f"model_name={config.model_name!r} reads images ({type(hf_config).__name__}); load it with "
            "FastVisionModel.from_pretrained"
        )
    return causal


def _require_one_quantization(config: LoadConfig, hf_config: Any) -> None:
    method = quantization_of(hf_config)
    if config.load_in_4bit and method not in (None, "bitsandbytes"):
        raise ConflictingArguments(
            f"model_name={config.model_name!r} is quantized already ({method}), and load_in_4bit=True (the default) "
            "would quantize it again; set load_in_4bit=False"
        )
    if method is not None and (config.full_finetuning or config.load_in_8bit):
        flag = "full_finetuning" if config.full_finetuning else "load_in_8bit"
        raise ConflictingArguments(
            f"{flag}=True, but model_name={config.model_name!r} is quantized already ({method}); expected a "
            "checkpoint in 16 or 32 bits"
        )


def quantization_of(hf_config: Any) -> str | None:
    """How the checkpoint is quantized ("bitsandbytes", "gptq", ...), None when it is not."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def sizes(config: LoadConfig, hf_config: Any, dtype: Any) -> tuple[int, int]:
    """(bytes of the engine's weights, bytes of transformers' copy), from the shapes alone.

    Raises ConflictingArguments when transformers has no causal language model for the config.
    """
    import torch

    cls = model_class(config, hf_config)
    try:
        with torch.device("meta"):
            shapes = cls.from_config(hf_config, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        raise ConflictingArguments(
            f"model_name={config.model_name!r}: transformers' {cls.__name__} has no model for "
            f"{type(hf_config).__name__}: {error}"
        ) from error
    bits = 4 if config.load_in_4bit or quantization_of(hf_config) == "bitsandbytes" else None
    of_trainer = weight_bytes(shapes, dtype.itemsize, bits=8 if config.load_in_8bit else bits)
    of_engine = weight_bytes(shapes, dtype.itemsize, bits=8 if config.load_in_fp8 else bits)
    return of_engine, of_trainer


def require_lora(hf_config: Any) -> None:
    """Raise LoraNotSupported when vLLM's own model of this architecture takes no LoRA. Imports vLLM's model.

    Architectures that vLLM does not know by name run on its transformers backend, which decides for itself.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    for name in getattr(hf_config, "architectures", None) or ():
        registered = getattr(ModelRegistry, "models", {}).get(name)
        load = getattr(registered, "load_model_cls", None)
        if callable(load):
            if not supports_lora(load()):
                raise LoraNotSupported(
                    f"trlpatch: vLLM has no LoRA for {name}, so an adapter cannot reach its rollouts; set "
                    "fast_inference=False, or train with TRL's own colocated engine (use_vllm=True), which pushes all "
                    "weights"
                )
            return
