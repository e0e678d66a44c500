"""A transformers model whose parameters are views of the engine's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from trlpatch.engine import probes
from trlpatch.engine.sharing.eligibility import engine_reason
from trlpatch.engine.sharing.names import EngineNames
from trlpatch.errors import CannotShare


def model_over_engine(llm: Any, *, config: Any = None, trust_remote_code: bool = False) -> Any:
    """Build the causal language model of `llm` over the engine's own weights: no weight is copied or allocated.

    The model is what `AutoModelForCausalLM.from_pretrained` gives, in evaluation mode and frozen, in the engine's
    dtype and on its device. `config` is a transformers config to build it from (attention implementation, name); by
    default the engine's checkpoint is asked. The engine's `hf_overrides` go on top. Attach it with
    `attach_engine(model, llm, shared_weights=True)`, which also protects it.

    Raises CannotShare with the reason when the engine does not hold the weights as transformers has them.
    """
    model, views = _planned(llm, config, trust_remote_code)
    _fill(model, views)
    _load_generation_config(model, llm)
    return model.eval()


def why_not_shareable(llm: Any, *, config: Any = None, trust_remote_code: bool = False) -> str | None:
    """Reason why `model_over_engine` would refuse this engine, None when it would not.

    Builds the model without weights: takes no memory and well below a second.
    """
    try:
        _planned(llm, config, trust_remote_code)
    except CannotShare as refusal:
        return str(refusal)
    return None


def _planned(llm: Any, config: Any, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """(model without weights, view for each name of its parameters)."""
    reason = engine_reason(llm)
    if reason is not None:
        raise CannotShare(reason)
    module = probes.engine_module(llm)
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.numel())
    model = _without_weights(_config(llm, config, trust_remote_code), dtype, trust_remote_code)
    return model, views_of(model, module)


def _config(llm: Any, config: Any, trust_remote_code: bool) -> Any:
    """A copy that may be changed, bearing the checkpoint's name."""
    settings = probes.model_config(llm)
    if config is not None:
        made = copy.deepcopy(config)
    else:
        from transformers import AutoConfig

        # Not the engine's own `hf_config`: vLLM rewrites some in place, and has classes of its own for others.
        source = getattr(settings, "hf_config_path", None) or settings.model
        try:
            made = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **_hub(settings))
        except (OSError, ValueError) as error:
            raise CannotShare(f"transformers cannot read the configuration of {source!r}: {error}") from error
    made = _overridden(made, getattr(settings, "hf_overrides", None))
    if not getattr(made, "_name_or_path", ""):
        made._name_or_path = settings.model
    return made


def _hub(settings: Any) -> dict[str, Any]:
    return {"revision": getattr(settings, "revision", None), "token": getattr(settings, "hf_token", None)}


def _overridden(config: Any, overrides: Any) -> Any:
    if callable(overrides):
        return overrides(config)
    for name, value in (overrides or {}).items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            _overridden(inner, value)
        else:
            setattr(config, name, value)
    return config


def _without_weights(config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The model with its parameters on the meta device and its buffers real, on the CPU."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    random_state = torch.get_rng_state()
    try:
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise CannotShare(f"transformers has no causal language model for this configuration: {error}") from error
    finally:
        torch.set_rng_state(random_state)
    model.config.dtype = dtype
    model.name_or_path = model.config._name_or_path
    return model


def _parameters(model: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """(name, module, name in it, parameter), shared parameters under each of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{leaf}".lstrip("."), module, leaf, parameter


def views_of(model: Any, module: Any) -> dict[str, Any]:
    """Name of a parameter of `model` (transformers) -> the part of `module` (vLLM) that it is, a plain tensor.

    The output embedding of a model with tied embeddings is the input embedding. Raises CannotShare.
    """
    import torch

    names = EngineNames(module)
    untied = {id(model.get_output_embeddings())} if _tied(model) else set()
    views: dict[str, Any] = {}
    for name, owner, leaf, parameter in _parameters(model):
        if id(owner) in untied and leaf == "weight":
            continue
        # Layers of other kinds may hold a square weight transposed (GPT-2's Conv1D), which no shape gives away.
        if parameter.dim() > 1 and not isinstance(owner, (torch.nn.Linear, torch.nn.Embedding)):
            raise CannotShare(f"{name!r} belongs to a {type(owner).__name__}, not to a linear layer or an embedding")
        view = names.view(name, parameter.shape)
        if view.dtype != parameter.dtype:
            raise CannotShare(f"{name!r} is {view.dtype} in the engine and {parameter.dtype} in transformers")
        views[name] = view
    for path, part in model.named_modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None and (buffer.is_meta or leaf not in part._non_persistent_buffers_set):
                raise CannotShare(f"the buffer {path}.{leaf} comes from the checkpoint; only parameters are shared")
    return views


def _tied(model: Any) -> bool:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return bool(tied) and model.get_output_embeddings() is not None


def _fill(model: Any, views: dict[str, Any]) -> None:
    """Put the views in, and the buffers on the same device."""
    import torch

    for name, owner, leaf, _ in list(_parameters(model)):
        if name in views:
            owner._parameters[leaf] = torch.nn.Parameter(views[name], requires_grad=False)
    if _tied(model):
        model.get_output_embeddings()._parameters["weight"] = model.get_input_embeddings()._parameters["weight"]
    device = next(iter(views.values())).device
    for part in model.modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[leaf] = buffer.to(device)


def _load_generation_config(model: Any, llm: Any) -> None:
    """As from_pretrained does; a checkpoint without one leaves what the model config gives."""
    from transformers import GenerationConfig

    settings = probes.model_config(llm)
    try:
        model.generation_config = GenerationConfig.from_pretrained(settings.model, **_hub(settings))
    except OSError:
        return
