"""LoRA support: which PEFT adapters are plain LoRA, the one kind that a LoRA request can carry.

Everything else is left to TRL's own full-weight sync. The rules on configurations are TRL's own
(`validate_lora_for_vllm_sync`, 1.14.0 and newer), plus what PEFT has grown since.
"""

from __future__ import annotations

from typing import Any

from trlpatch.policy.adapter import LoraView
from trlpatch.policy.base_parameters import trained_parameter
from trlpatch.policy.sharding import shape_of, sharded_by, unreadable_reason

REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT initialisations that subtract the new adapter from the base weights."""

_VERDICT = "lora support"


def unsupported_reason(view: LoraView) -> str | None:
    """Why the model's active adapter is not a plain LoRA adapter; None when it is one."""
    adapters = view.active or tuple(view.configs)
    if len(adapters) != 1:
        return f"{len(adapters)} adapters are active ({', '.join(adapters)}); a request carries one"
    config = view.configs.get(adapters[0])
    if config is None:
        return f"the active adapter {adapters[0]!r} has no PEFT configuration"
    reason = config_reason(config)
    if reason is None:
        # Layers and parameters can only differ from what was looked at when the weights object is another one.
        derived = view.weights(adapters[0]).derived
        if _VERDICT not in derived:
            derived[_VERDICT] = _layer_reason(view, adapters[0]) or _storage_reason(view, adapters[0])
        reason = derived[_VERDICT]
    return reason or _switch_reason(view) or _trained_beside(view)


def config_reason(config: object) -> str | None:
    """Why an adapter of this PEFT configuration is not a plain LoRA adapter; None when it may be one."""

    def setting(name: str) -> Any:
        return getattr(config, name, None)

    kind = str(getattr(setting("peft_type"), "value", setting("peft_type")))
    if bool(setting("is_prompt_learning")):
        return f"{type(config).__name__} learns a prompt, not a LoRA adapter"
    if kind != "LORA":
        return f"{type(config).__name__} is not a LoRA adapter"
    if setting("modules_to_save"):
        return f"modules_to_save={list(setting('modules_to_save'))} are trained in full, not as a low-rank delta"
    if setting("use_dora"):
        return "DoRA's magnitude vectors have no place in a LoRA request"
    if setting("bias") not in (None, "none"):
        return f"bias={setting('bias')!r} trains biases, which a LoRA request does not carry"
    for name, what in (
        ("lora_bias", "trains a bias in lora_B"),
        ("target_parameters", "adapts parameters of fused experts"),
        ("trainable_token_indices", "trains rows of the embedding"),
        ("layer_replication", "replicates layers that the engine does not have"),
    ):
        if setting(name):
            return f"{name}={setting(name)!r} {what}"
    init = setting("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REWRITES_BASE):
        return f"init_lora_weights={init!r} rewrites the base weights; the engine has the checkpoint's"
    return None


def _layer_reason(view: LoraView, adapter: str) -> str | None:
    adapted = False
    for path, layer in view.layers:
        name = path.rpartition(".")[2]
        if adapter in getattr(layer, "lora_embedding_A", {}) or name == "embed_tokens":
            return f"it targets the embedding {path!r}"
        if adapter not in getattr(layer, "lora_A", {}):
            continue
        adapted = True
        if name == "lm_head":
            # https://github.com/vllm-project/vllm/issues/51594
            return f"it targets {path!r}; vLLM drops that delta from prompt log-probabilities"
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is not None or adapter in getattr(layer, "lora_magnitude_vector", {}):
            return f"{path!r} uses the LoRA variant {type(variant).__name__}"
        if type(layer).__name__ in ("ParamWrapper", "MultiheadAttention"):
            return f"{path!r} is adapted through PEFT's {type(layer).__name__}"
        if len(shape_of(layer.lora_A[adapter].weight)) != 2:
            return f"{path!r} is not a linear layer"
        if getattr(layer.lora_B[adapter], "bias", None) is not None:
            return f"{path!r} has a bias in lora_B"
    return None if adapted else "no linear layer carries it"


def _switch_reason(view: LoraView) -> str | None:
    switches = view.switches
    if any(switches) and not all(switches):
        path = next(path for (path, _), off in zip(view.layers, switches, strict=True) if off)
        return f"the adapter is disabled in some layers only, among them {path!r}"
    return _merged_beside(view) if view.merged else None


def _merged_beside(view: LoraView) -> str | None:
    active = set(view.active)
    for (path, _), names in zip(view.layers, view.found.state("merged"), strict=True):
        others = [] if isinstance(names, bool) else [name for name in names if name not in active]
        if others:
            return f"the adapter {others[0]!r}, which is not active, is merged into {path!r}"
    return None


def _trained_beside(view: LoraView) -> str | None:
    path = trained_parameter(view)
    return None if path is None else f"{path!r} is trained beside it (requires_grad=True), and is no part of a request"


def _storage_reason(view: LoraView, adapter: str) -> str | None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in view.base.modules()):
        return "its parameters are sharded by FSDP"
    for path, a, b, _ in view.pairs(adapter):
        for parameter in (a, b):
            if sharded_by(parameter) is not None:
                reason = unreadable_reason(parameter)
                if reason is not None:
                    return reason
            elif parameter.device.type == "meta" or parameter.numel() == 0:
                return f"the parameters of {path!r} hold no data in this process"
    return None


def rank_of(view: LoraView) -> int:
    """The largest rank of the active adapter, after rank_pattern."""
    return view.weights(view.active[0]).rank
