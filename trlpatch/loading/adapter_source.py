"""`from_pretrained` of a PEFT adapter: whose adapter it is, and the adapter on its loaded base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trlpatch.errors import ConflictingArguments, ModelNotFound
from trlpatch.loading.checkpoint import hub_has
from trlpatch.loading.load_config import LoadConfig

CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """An adapter in a directory or on the hub.

    Attributes:
        name: the directory, or the id on the hub.
        arguments: how PEFT is to load it: revision, subfolder, token, cache.
        rank: its largest rank, after rank_pattern; 1 where it has none.
        base: of base_model_name_or_path.
        base_revision: the revision of the base model.
    """

    name: str
    arguments: dict[str, Any]
    rank: int
    base: str
    base_revision: str | None


def adapter_source(config: LoadConfig) -> AdapterSource | None:
    """The adapter that `model_name` names; None when it names a model.

    Raises:
        ModelNotFound: its configuration cannot be read, or does not say of which model it is.
        ConflictingArguments: a place that holds a model as well; full_finetuning.
    """
    arguments = _peft_arguments(config)
    place = Path(config.model_name).expanduser()
    if place.is_dir():
        place = place / str(arguments.get("subfolder") or "")
        if not (place / CONFIG).is_file():
            return None
        if (place / "config.json").is_file():
            raise _both(config, str(place))
        name = str(Path(config.model_name).expanduser())
    else:
        name = config.model_name
        if not _hub_has(config, CONFIG):
            return None
        if _hub_has(config, "config.json"):
            raise _both(config, "the repository")
    from peft import PeftConfig

    try:
        found = PeftConfig.from_pretrained(name, **arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelNotFound(
            f"model_name={config.model_name!r}: its {CONFIG} is no configuration that the installed PEFT reads: "
            f"{error!r}"
        ) from error
    base = getattr(found, "base_model_name_or_path", None)
    if not base:
        raise ModelNotFound(
            f"model_name={config.model_name!r} is a PEFT adapter whose {CONFIG} does not say of which model it is: "
            "expected base_model_name_or_path, a directory or an id on the hub; write it there, or "
            f"{_by_hand(config.model_name)}"
        )
    if config.full_finetuning:
        raise ConflictingArguments(
            f"model_name={config.model_name!r} is a PEFT adapter, and full_finetuning=True trains the weights under "
            "it; merge it with PEFT (model.merge_and_unload()), save that and load it, or leave full_finetuning out"
        )
    rank = max(_ranks(found), default=1)
    return AdapterSource(name, arguments, rank, str(base), getattr(found, "revision", None))


def of_base(config: LoadConfig, source: AdapterSource) -> LoadConfig:
    """The configuration that loads the adapter's base model, with an engine that its rank fits into.

    `revision` and `subfolder` are the adapter's; the revision of the base model is in the adapter's configuration.
    """
    tokenizer = config.tokenizer_name or (source.name if _has_tokenizer(config, source) else None)
    return dataclasses.replace(
        config,
        model_name=source.base,
        revision=source.base_revision,
        max_lora_rank=max(config.max_lora_rank, source.rank),
        tokenizer_name=tokenizer,
        model={name: value for name, value in config.model.items() if name != "subfolder"},
    )


def base_not_found(source: AdapterSource, error: ModelNotFound) -> ModelNotFound:
    """The error for an adapter whose base model is not there."""
    return ModelNotFound(
        f"model_name={source.name!r} is a PEFT adapter of {source.base!r} (base_model_name_or_path in its {CONFIG}), "
        f"which cannot be loaded: {error}. Write where the base model is into {CONFIG}, or {_by_hand(source.name)}"
    )


def load_adapter(model: Any, source: AdapterSource) -> Any:
    """Return the PEFT model of `model` with the adapter, trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, source.name, is_trainable=True, **source.arguments)


def _both(config: LoadConfig, place: str) -> ConflictingArguments:
    # transformers loads the base model that the adapter names, vLLM the model that lies beside the adapter.
    return ConflictingArguments(
        f"model_name={config.model_name!r}: {place} has a model (config.json) and a PEFT adapter ({CONFIG}), and "
        "which of them is meant is not said; expected a directory or repository with one of them. Save the adapter "
        f"alone, or load the model and then the adapter: {_by_hand(config.model_name)}"
    )


def _by_hand(adapter: str) -> str:
    return (
        "model, tokenizer = FastLanguageModel.from_pretrained(BASE), then "
        f"model = PeftModel.from_pretrained(model, {adapter!r}, is_trainable=True)"
    )


def _peft_arguments(config: LoadConfig) -> dict[str, Any]:
    """What PEFT's `from_pretrained` is asked with; it hands the names on to huggingface_hub."""
    names = ("subfolder", "cache_dir", "force_download", "local_files_only")
    arguments = {name: config.model[name] for name in names if name in config.model}
    for name in ("revision", "token"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    return arguments


def _ranks(config: Any) -> Iterator[int]:
    for rank in (getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()):
        if isinstance(rank, int):
            yield rank


def _has_tokenizer(config: LoadConfig, source: AdapterSource) -> bool:
    """Was a tokenizer saved at the top of the adapter's place? Trainers do so, with the chat template in it."""
    place = Path(source.name)
    if source.arguments.get("subfolder"):
        return False
    return (place / "tokenizer_config.json").is_file() if place.is_dir() else _hub_has(config, "tokenizer_config.json")


def _hub_has(config: LoadConfig, file: str) -> bool:
    return hub_has(config.model_name, file, **_peft_arguments(config))
