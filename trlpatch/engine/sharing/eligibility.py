"""Eligibility for weight sharing, by the engine's settings and tensors, before any name is looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trlpatch.engine import probes
from trlpatch.engine.backend import backend_of
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.sharing.names import held_parameters
from trlpatch.errors import CannotShare

if TYPE_CHECKING:
    from torch.nn import Module

_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")


def unsupported_reason(llm: RolloutEngine) -> str | None:
    """Why nobody can share this engine's weights, as a sentence; None when there is no such reason."""
    return layout_reason(llm) or _asleep_reason(llm)


def layout_reason(llm: RolloutEngine) -> str | None:
    """As `unsupported_reason`, of an engine that may be asleep."""
    try:
        module = backend_of(llm).worker_model()
    except CannotShare as refusal:
        return str(refusal)
    return _settings_reason(llm) or _module_reason(module) or _tensor_reason(module)


def _settings_reason(llm: RolloutEngine) -> str | None:
    config = probes.reach(llm, "llm_engine", "vllm_config")
    for parallel in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = probes.reach(config, "parallel_config", parallel) or 1
        if size > 1:
            return f"{parallel}={size}: each rank holds a part of the weights only"
    model = probes.model_config(llm)
    quantization = getattr(model, "quantization", None) or probes.reach(config, "quant_config")
    if quantization is not None:
        name = quantization if isinstance(quantization, str) else type(quantization).__name__
        return f"the engine's weights are quantized ({name})"
    if getattr(model, "multimodal_config", None) is not None:
        return "the model is multimodal; only text models are shared"
    offloaded = (
        probes.reach(config, "offload_config", "uva", "cpu_offload_gb"),
        probes.reach(config, "offload_config", "prefetch", "offload_group_size"),
        probes.reach(config, "cache_config", "cpu_offload_gb"),  # up to 0.17
    )
    if any(offloaded):
        return "the engine keeps a part of its weights in host memory (cpu_offload_gb, offload_group_size)"
    return None


def _asleep_reason(llm: RolloutEngine) -> str | None:
    asleep = backend_of(llm).asleep()
    if asleep:
        return f"the engine sleeps ({', '.join(sorted(asleep))}); call llm.wake_up() first"
    return None


def _module_reason(module: Module) -> str | None:
    for part in module.modules():
        if any("moe" in kind.__name__.lower() for kind in type(part).__mro__):
            return f"the model has experts ({type(part).__name__}), whose weights vLLM repacks"
    return None


def _tensor_reason(module: Module) -> str | None:
    devices, dtypes = set(), set()
    for name, held in held_parameters(module):
        parameter = held.parameter
        if parameter.is_inference():
            return f"the engine's {name!r} was made in inference mode; autograd cannot use it"
        if parameter.is_meta or getattr(parameter, "_vllm_is_uva_offloaded", False):
            return f"the engine's {name!r} is not in device memory"
        if parameter.numel():
            devices.add(str(parameter.device))
            dtypes.add(str(parameter.dtype))
    if len(devices) > 1:
        return f"the engine's weights are on several devices ({', '.join(sorted(devices))})"
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"the engine's weights are {', '.join(sorted(dtypes)) or 'empty'}; expected one of {', '.join(_DTYPES)}"
    return None
