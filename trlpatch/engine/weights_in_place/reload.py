"""vLLM's own layerwise reload, for weights that its CPU backend has repacked: each layer is loaded and packed anew.

What `LLM.start_weight_update`, `update_weights` and `finish_weight_update` run in a worker. On other devices it would
gain nothing over TRL's push but for quantized layers, which nobody has tried here: these go through TRL's push.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trlpatch.engine.single_adapter.storage import rows_follow_loading
from trlpatch.engine.weights_in_place import merge
from trlpatch.errors import EngineMismatch
from trlpatch.policy.policy_weights import PolicyWeight

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def unsupported_reason(module: Module) -> str | None:
    """Why this model's weights cannot be loaded anew; None when they can."""
    devices = {parameter.device.type for parameter in module.parameters()}
    if devices != {"cpu"}:
        return "only vLLM's CPU backend is reloaded layer by layer"
    try:
        from vllm.model_executor.model_loader import reload
    except ImportError:
        return "this vLLM has no layerwise reload"
    if not all(callable(getattr(reload, f"{step}_layerwise_reload", None)) for step in ("initialize", "finalize")):
        return "this vLLM has no layerwise reload"
    return lora_loader_reason(module)


def lora_loader_reason(module: Module) -> str | None:
    """Why this model's loader cannot load weights into layers that LoRA has wrapped; None when it can, or has none."""
    import torch

    mapper = getattr(module, "hf_to_vllm_mapper", None)
    wrapped = any(isinstance(part._modules.get("base_layer"), torch.nn.Module) for part in module.modules())
    if wrapped and not (hasattr(mapper, "get_rename_mapper") or hasattr(mapper, "get_unstacked_mapper")):
        return "loaders of vLLM below 0.25 do not know layers that LoRA has wrapped"
    return None


def push_refusal(module: Module) -> str | None:
    """Why a push under a checkpoint's names fails in this model; None where nothing says that it does.

    LoRA puts its layers around the model's, and weights that are fused keep their name without `base_layer`. vLLM
    0.28's LoRA layers have a `load_weights` that passes them on; those of 0.23 have none, and the loader raises
    "There is no module or parameter named 'model.layers.0.self_attn.qkv_proj.weight'".
    """
    import torch

    for path, part in module.named_modules():
        wraps = isinstance(part._modules.get("base_layer"), torch.nn.Module) and hasattr(part, "can_replace_layer")
        if wraps and not callable(getattr(part, "load_weights", None)):
            return f"{path!r} is a LoRA layer ({type(part).__name__}), which the loader of this vLLM does not know"
    return None


def load(weights: list[PolicyWeight], module: Any, model_config: Any) -> None:
    """Load the whole policy. What fails in between leaves a model of two policies.

    Raises:
        EngineMismatch: vLLM's loader does not take what the policy has.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    with rows_follow_loading():
        initialize_layerwise_reload(module)
        try:
            module.load_weights(checkpoint_tensors(weights))
        except BaseException as error:
            with contextlib.suppress(Exception):
                finalize_layerwise_reload(module, model_config)
            if not isinstance(error, Exception):
                raise
            raise EngineMismatch(
                f"writing weights in place: vLLM's loader of {type(module).__name__} does not take the policy's: "
                f"{str(error) or type(error).__name__}. Expected the parameters of the checkpoint that the engine has "
                "under its names; a model inside another PEFT model, or a layer of its own, has others: merge "
                "the inner adapter first (`merge_and_unload`), or build the engine from this model"
            ) from error
        finalize_layerwise_reload(module, model_config)
    pack_tied(module)


def pack_tied(module: Module) -> None:
    """Pack a tied output layer anew: it is not loaded under its own name, and vLLM's reload leaves its copy as it was.

    On a CPU it computes with a copy of the embeddings, packed by `process_weights_after_loading`.
    """
    owners: dict[int, list[Any]] = {}
    for part in module.modules():
        parameter = part._parameters.get("weight")
        if parameter is not None and parameter.numel():
            owners.setdefault(id(parameter), []).append(part)
    for parts in owners.values():
        for part in parts if len(parts) > 1 else ():
            method = getattr(part, "quant_method", None)
            if method is not None and hasattr(part, "cpu_linear"):
                method.process_weights_after_loading(part)


def checkpoint_tensors(weights: list[PolicyWeight]) -> Iterator[tuple[str, Tensor]]:
    """(path, merged parameter), tied ones once, as checkpoints have them."""
    seen: set[int] = set()
    for weight in weights:
        if id(weight.base) not in seen:
            seen.add(id(weight.base))
            whole = weight.base.detach()
            yield weight.path, whole if weight.plain else merge.merged(weight, slice(None), whole.device)
