"""A PEFT model without base weights: modules on the meta device, with the real tensors of one adapter."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trlpatch.errors import CannotExport
from trlpatch.policy.adapter_tensors import PEFT_PREFIX
from trlpatch.policy.lora_support import REWRITES_BASE

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "default"
_SHARED = ("VERA", "PVERA", "VBLORA", "RANDLORA", "TINYLORA", "UNILORA")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


def model_class(config: Any) -> Any:
    """The class of a checkpoint: the first of its architectures that transformers has, else AutoModelForCausalLM."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a config on the meta device: its modules, shapes and ties, no data."""
    import torch
    import transformers

    cls = model_class(config)
    config = copy.deepcopy(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cls is transformers.AutoModelForCausalLM:
            return cls.from_config(config, trust_remote_code=trust_remote_code)
        return cls._from_config(config)


def inject(model: Any, adapter_config: Any, tensors: Mapping[str, Tensor], *, where: str, saved: bool = True) -> Any:
    """Put an adapter of `tensors` (PEFT's names in files) into a model on the meta device; the model that it is now.

    Raises:
        CannotExport: the kind has no layers to merge, was made over base weights of its own, or does not fit.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    refuse_kind(adapter_config, where=where, saved=saved)
    config = copy.deepcopy(adapter_config)
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # what it starts from is overwritten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, config, adapter_name=ADAPTER, low_cpu_mem_usage=True)
            with _as_saved(adapted):
                result = set_peft_model_state_dict(
                    adapted, _once(tensors), adapter_name=ADAPTER, low_cpu_mem_usage=True
                )
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CannotExport(
                f"reading the adapter in {where}: it does not fit {type(model).__name__}: {error}; expected the "
                "base model that it was trained on: name it with base="
            ) from error
    _fill_ranks(adapted)
    unexpected = list(getattr(result, "unexpected_keys", ()))
    empty = [name for name, one in adapted.named_parameters() if one.is_meta and _of_adapter(name)]
    if unexpected or empty:
        found = f"{unexpected[0]!r} has no place in it" if unexpected else f"{empty[0]!r} is not in the files"
        raise CannotExport(
            f"reading the adapter in {where}: it does not fit {type(model).__name__}: {found}; expected the base "
            "model that it was trained on (name it with base=), and the PEFT that saved it"
        )
    return adapted


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what PEFT saves of an embedding in modules_to_save beside it, after a resize."""
    found = dict(tensors)
    for name in tensors:
        for part in (".modules_to_save.", ".original_module."):
            if part in name and name.replace(part, ".") in tensors:
                found.pop(name, None)
    return found


@contextlib.contextmanager
def _as_saved(adapted: Any) -> Iterator[None]:
    """Keep PEFT from casting and moving what it loads to the base layer's dtype and device, which is meta."""
    name = "_move_adapter_to_device_of_base_layer"
    layers = [one for one in adapted.modules() if hasattr(one, name)]
    for one in layers:
        one.__dict__[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for one in layers:
            del one.__dict__[name]


def _fill_ranks(adapted: Any) -> None:
    """AdaLoRA divides by the number of ranks that it left, which its files say by their shapes alone."""
    import torch

    for layer in adapted.modules():
        ranks = getattr(layer, "ranknum", None)
        if ranks is not None and ADAPTER in ranks and ranks[ADAPTER].is_meta:
            count = torch.tensor(float(layer.lora_A[ADAPTER].shape[0]))
            ranks[ADAPTER] = torch.nn.Parameter(count, requires_grad=False)


def _of_adapter(name: str) -> bool:
    return f".{ADAPTER}" in name


def refuse_kind(config: Any, *, where: str, saved: bool) -> None:
    """Raise CannotExport for adapters that are no change of weights.

    `saved` ones have only their files: those whose initialisation changed the base weights are not among them.
    """
    kind = str(getattr(getattr(config, "peft_type", None), "value", getattr(config, "peft_type", "")))
    if getattr(config, "is_prompt_learning", False) or kind in ("XLORA", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"):
        raise CannotExport(
            f"merging the adapter in {where}: {type(config).__name__} ({kind}) is no change of the base weights, so "
            'there is nothing to merge; export the adapter alone (save_method="lora")'
        )
    if kind in _SHARED:
        raise CannotExport(
            f"merging the adapter in {where}: {kind} layers share projections, which are not in any of them; merge "
            "with PEFT in float32 (merge_and_unload), and export the model of that; or export the adapter alone "
            '(save_method="lora")'
        )
    init = getattr(config, "init_lora_weights", None)
    if saved and isinstance(init, str) and init.lower().startswith(REWRITES_BASE):
        raise CannotExport(
            f"merging the adapter in {where}: init_lora_weights={init!r} took the initial adapter out of the base "
            "weights, and the files hold neither; expected a live model (model.save_pretrained_merged), or an adapter "
            "saved with PEFT's path_initial_model_for_weight_conversion, which is plain LoRA"
        )
    if getattr(config, "layer_replication", None):
        raise CannotExport(
            f"merging the adapter in {where}: layer_replication={config.layer_replication!r} uses base layers several "
            'times with another delta each; export the adapter alone (save_method="lora")'
        )


def rows_of_saved_embeddings(tensors: Mapping[str, Tensor]) -> int | None:
    """The vocabulary of an adapter that was saved with its embedding (after a resize), else None."""
    for key, tensor in tensors.items():
        path = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if path.endswith(tuple(f"{name}.weight" for name in _EMBEDDINGS)) and tensor.dim() == 2:
            return int(tensor.shape[0])
    return None
