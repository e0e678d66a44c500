"""Engine reuse hook: TRL's `LLM(...)` yields the engine that the model carries, or builds one, ready for LoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from trlpatch.engine import guards, probes
from trlpatch.engine.attach import attached_engine, share_in_copies
from trlpatch.engine.build import engine_argument_names
from trlpatch.engine.cudagraphs import compilation_config
from trlpatch.engine.lora_limits import MAX_CPU_LORAS
from trlpatch.engine.model_inspection import inspected_here
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.rank_agreement import seed_alike
from trlpatch.engine.single_adapter.install import lora_layers
from trlpatch.engine.state import state_of
from trlpatch.errors import AdapterNotExpressible
from trlpatch.hooks import ranks
from trlpatch.hooks.bare_requests import bare_request
from trlpatch.hooks.protocols import Owner
from trlpatch.log import log_once
from trlpatch.options import active
from trlpatch.policy import lora_support
from trlpatch.policy.adapter import lora_view

if TYPE_CHECKING:
    from torch.nn import Module

Model: TypeAlias = "Module | str | None"
"""What trainers take as `model`."""
BuildEngine: TypeAlias = Callable[..., RolloutEngine]
"""`vllm.LLM`, or what stands in its place."""


def engine(owner: Owner, model: Model, build: BuildEngine) -> BuildEngine:
    """What stands where TRL wrote `LLM`: a callable that takes TRL's own arguments and returns the engine.

    `owner` is the trainer or VLLMGeneration being initialised; its `.model`, where it is set already, counts more than
    `model`, because TRL may have applied a `peft_config` to it.

    An engine that the model carries is returned as it is and `build` is not called, unless
    `colocate="never"`; the rank that TRL has put into the environment for an engine of its own is taken out again.
    Otherwise `build` gets TRL's arguments, and for a LoRA model also `enable_lora=True`,
    the smallest legal `max_lora_rank`, `max_loras=1`, `max_cpu_loras` for saved adapters beside it, and
    `logprobs_mode="processed_logprobs"` where TRL names none (0.23, which already corrects with the sampler's
    log-probabilities).
    """
    own = getattr(owner, "model", None)
    model = model if own is None else own
    attached = attached_engine(model)
    if attached is not None and active().colocate != "never":
        return _Reuse(attached)
    return _Build(owner, model, build)


class _Reuse:
    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def __call__(self, *args: object, **kwargs: object) -> RolloutEngine:
        state_of(self._engine).attached = True
        _watch(self._engine)
        share_in_copies(self._engine)
        seed_alike(self._engine)
        ranks.restore()
        log_once(self._engine, "rollouts use the engine attached to the model; TRL builds none of its own")
        return self._engine


class _Build:
    def __init__(self, owner: Owner, model: Model, build: BuildEngine) -> None:
        self._owner = owner
        self._model = model
        self._build = build

    def __call__(self, *args: object, **kwargs: object) -> RolloutEngine:
        lora = _lora_arguments(self._owner, self._model, kwargs)
        with inspected_here(kwargs):
            return self._built(args, kwargs, lora)

    def _built(self, args: tuple[object, ...], kwargs: dict[str, object], lora: dict[str, object]) -> RolloutEngine:
        if not lora:
            return self._build(*args, **kwargs)
        try:
            with lora_layers({**kwargs, **lora}, active().lora_layers) as given:
                built = self._build(*args, **given)
        except Exception as error:
            added = ", ".join(f"{name}={value!r}" for name, value in lora.items())
            error.add_note(
                f"trlpatch built TRL's engine with {added} because the model has a LoRA adapter; "
                'PatchFastRL(adapter="off") builds it as TRL does'
            )
            raise
        if probes.looks_like_engine(built):
            _watch(built)
        return built


def _watch(engine: RolloutEngine) -> None:
    """From now on what a trainer asks of this engine without an adapter carries the one being trained."""
    state = state_of(engine)
    state.bare_request = bare_request
    guards.install(engine, state)


def _lora_arguments(owner: Owner, model: Model, given: Mapping[str, object]) -> dict[str, object]:
    """The keyword arguments to add to TRL's; none for a model without an adapter that vLLM can serve."""
    view = lora_view(model)
    if view is None or active().adapter in ("off", "merge") or given.get("enable_lora") is not None:
        return {}
    reason = lora_support.unsupported_reason(view)
    rank = None
    if reason is None:
        needed = lora_support.rank_of(view)
        rank = probes.legal_rank(needed)
        if rank is None:
            reason = f"its rank {needed} is above vLLM's largest, {probes.legal_ranks()[-1]}"
    if reason is not None:
        if active().adapter == "request":
            raise AdapterNotExpressible(
                f'building the rollout engine with adapter="request": vLLM cannot serve the adapter, {reason}; '
                'use a plain LoRA adapter, or PatchFastRL(adapter="auto") for TRL\'s full-weight sync'
            )
        name = type(owner).__name__
        log_once(owner, f"{name}: TRL's engine is built without LoRA: {reason}", level=logging.WARNING)
        return {}
    added: dict[str, object] = {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": 1,
        "max_cpu_loras": MAX_CPU_LORAS,
    }
    if "logprobs_mode" not in given and "logprobs_mode" in engine_argument_names():
        added["logprobs_mode"] = "processed_logprobs"
    if graphs := compilation_config(given):
        added["compilation_config"] = graphs
    return added
