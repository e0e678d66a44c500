"""Attach an engine to a model, with all that patched trainers look for: the engine and a live adapter request."""

from __future__ import annotations

import contextlib
import copy
import os
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trlpatch.engine import guards, live_request, probes, stock_trainers
from trlpatch.engine.backend import backend_of
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.engine.same_model import require_same_model
from trlpatch.engine.saved_adapter import is_adapter, saved_request
from trlpatch.engine.sharing import overlaps, protect, unprotect, verify_overlap
from trlpatch.engine.sleep import awake
from trlpatch.engine.state import EngineState, forget, state_of
from trlpatch.engine.weights_publisher import give_back_base, write_base
from trlpatch.errors import AdapterNotExpressible, EngineMismatch, InvalidOption, NotAnEngine, StaleAdapter
from trlpatch.policy import content_mark
from trlpatch.policy.adapter import base_of, lora_view, unwrap
from trlpatch.policy.adapter_tensors import PEFT_PREFIX
from trlpatch.policy.base_parameters import changed_parameter, contents
from trlpatch.policy.sharding import filled_later

if TYPE_CHECKING:
    from torch.nn import Module

_ENGINE = "vllm_engine"
_METHODS = ("load_lora", "save_lora", "fast_generate")
_LIVE: Any = object()

Model = TypeVar("Model")


def attach_engine(model: Model, llm: RolloutEngine, *, shared_weights: bool = False, check: bool = True) -> Model:
    """Make `llm` the engine that trainers of `model` roll out on, and return the model.

    Sets `model.vllm_engine`, `model.load_lora`, `model.save_lora` and `model.fast_generate`. They are put on
    the transformers model under PEFT, so they are visible through PEFT models made of it before or after, and
    survive `merge_and_unload()`. A `copy.deepcopy` of the model shares the engine. `shared_weights=True` says
    that the base weights of the model are the engine's own memory: that is verified, the engine's weights never
    sleep, and what would change or move them raises SharedWeights (see `trlpatch.engine.sharing.protect`).

    Vocabulary and log-probabilities of some forty tokens are compared, without an adapter: an engine of another
    checkpoint would train silently on its samples. `check=False` is for those who know that they differ.

    Raises:
        NotAnEngine: `llm` is no `vllm.LLM`, or `model` no model.
        EngineMismatch: the engine is asleep, or not of the same model, or the model shares its memory without
            `shared_weights=True`.
        EngineBusy: the engine has unfinished requests.
        CannotShare: with `shared_weights=True` the model shares less than all base weights.
    """
    if isinstance(model, (str, os.PathLike)) or not callable(getattr(model, "named_modules", None)):
        raise NotAnEngine(
            "attach_engine(model, llm): model must be a loaded transformers or PEFT model, got "
            f"{type(model).__name__}; "
            "load it first, e.g. AutoModelForCausalLM.from_pretrained(...)"
        )
    if not probes.looks_like_engine(llm):
        raise NotAnEngine(
            f"attach_engine(model, llm): llm must be a vllm.LLM (it has `generate` and `llm_engine`), got "
            f"{type(llm).__name__}; build one with vllm.LLM(model=..., enable_lora=True)"
        )
    sleeping = backend_of(llm).asleep()
    if sleeping:
        raise EngineMismatch(
            f"attach_engine(model, llm): the engine sleeps ({', '.join(sorted(sleeping))}); it must be awake to be "
            "attached: call llm.wake_up() first"
        )
    base = base_of(model)
    if shared_weights:
        verify_overlap(base, llm)
    elif overlaps(base, llm):
        raise EngineMismatch(
            f"attach_engine(model, llm): base weights of {type(base).__name__} are the engine's own memory, which a "
            "sleep would take away; expected weights of their own, or attach_engine(model, llm, shared_weights=True)"
        )
    state = state_of(llm)
    compared = not check or require_same_model(base, llm, state)
    if shared_weights:
        protect(base)
    state.attached = True
    state.attached_to.add(base)
    if compared:
        state.compared.add(base)
    if shared_weights:
        state.sharers.add(base)
    else:
        state.sharers.discard(base)
        state.weights_attached[base] = {} if filled_later() else contents(base)
    state.shared_weights = bool(state.sharers)  # of this model or of one attached before
    share_in_copies(llm)
    guards.install(llm, state)
    setattr(base, _ENGINE, llm)
    base.load_lora = types.MethodType(_load_lora, base)
    base.save_lora = types.MethodType(save_lora, base)
    base.fast_generate = types.MethodType(_fast_generate, base)
    stock_trainers.watch()
    return model


def detach_engine(model: object) -> RolloutEngine | None:
    """Undo `attach_engine`; returns the engine that was attached (still running), or None.

    The model has no `vllm_engine`, `fast_generate`, `load_lora` and `save_lora` any more, and the engine is vLLM's as
    it was built: requests carry what they name, and it can be attached again, to a model of the same weights (others
    are refused as ever). A trainer that was built with it keeps it: build trainers after that.

    Shared weights stay shared, but nothing guards them any more. Another model that the engine is attached to keeps
    it, with its guards. Weights that were a merged policy are the base model's again, if the engine is awake.
    """
    base = base_of(model)
    unprotect(base)
    llm: RolloutEngine | None = base.__dict__.pop(_ENGINE, None)
    for name in _METHODS:
        base.__dict__.pop(name, None)
    content_mark.forget(base)
    if llm is not None:
        state = state_of(llm)
        for models in (state.attached_to, state.sharers, state.compared):
            models.discard(base)
        if state.attached_to:
            state.shared_weights = bool(state.sharers)
            state.weights_attached.pop(base, None)
            if state.published is not None and state.published.model() is base:
                state.published = None
                if state.adapter_sync is not None:
                    state.adapter_sync.invalidate()
            return llm
        give_back_base(model, llm)
        with contextlib.suppress(AttributeError):
            delattr(llm, "__deepcopy__")
        forget(llm)
    return llm


def attached_engine(model: object) -> RolloutEngine | None:
    """The engine a model carries (ours, or one set by another library as `model.vllm_engine`), or None."""
    if model is None or isinstance(model, (str, os.PathLike)):
        return None
    for holder in (model, unwrap(model), base_of(model)):
        found = getattr(holder, _ENGINE, None)
        if found is not None and probes.looks_like_engine(found):
            engine: RolloutEngine = found
            return engine
    return None


def share_in_copies(llm: RolloutEngine) -> None:
    """TRL deep-copies models to make reference models; an engine cannot be copied and need not be."""
    setattr(llm, "__deepcopy__", types.MethodType(_same_object, llm))  # noqa: B010 - no part of the engine's type


def _same_object(self: RolloutEngine, memo: dict[int, Any]) -> RolloutEngine:
    """Not a copy, and what is known of the model that is being copied holds for its copy."""
    state = state_of(self)
    for base in (*state.weights_attached, *state.sharers):
        twin = memo.get(id(base))  # copy.deepcopy notes it before it copies what the model refers to
        if twin is None:
            continue
        state.weights_attached[twin] = contents(base) if base in state.sharers else state.weights_attached[base]
        if base in state.compared:
            state.compared.add(twin)
    return self


def _load_lora(self: Module, name: str | None = None, load_tensors: bool | None = None) -> LoraRequest | None:
    """A LoRARequest: of the live adapter, or of an adapter saved in the directory `name`.

    `load_tensors=True`, or no arguments: the adapter of this model as it is now. `load_tensors=False`, or a
    `name` that is an adapter directory: that one, from disk.

    Raises:
        InvalidOption: `name` has to be a directory and is none.
        EngineMismatch: the adapter in it is of another model.
        AdapterNotExpressible: vLLM would compute something else than PEFT does.
    """
    engine = _require_attached(self)
    live_adapter = name is None if load_tensors is None else load_tensors
    if live_adapter:
        return current_request(self, engine, "model.load_lora")
    directory = Path(name or "")
    if name is None or not is_adapter(directory):
        raise InvalidOption(
            f"model.load_lora({name!r}): expected a directory with adapter_config.json, found none; save the adapter "
            "with model.save_lora(directory), or call model.load_lora() for the live adapter"
        )
    wrong = backend_of(engine).adapter_misfit(directory)
    if wrong is not None:
        raise EngineMismatch(
            f"model.load_lora({name!r}): {wrong}; vLLM would load what fits of it without a word; expected an adapter "
            "of the engine's own model"
        )
    return saved_request(directory, engine, state_of(engine))


def current_request(model: object, engine: RolloutEngine, doing: str) -> LoraRequest | None:
    """`require_request` while nothing else runs on the engine; requests that this thread has added may wait in it.

    Raises:
        EngineBusy: another thread generates; or the adapter has changed while requests of the version before are
            unfinished, which are aborted.
    """
    state, inner = state_of(engine), engine.llm_engine
    with state.occupancy.handing_over(inner, doing):
        before = state.published
        request = live_request.require_request(model, engine)
        if before is not None and state.published is not None and state.published.request is not before.request:
            state.occupancy.refuse_mixed(inner, doing)
        return request


def _require_attached(model: object) -> RolloutEngine:
    engine = attached_engine(model)
    if engine is None:
        raise NotAnEngine(
            f"a method of {type(model).__name__} needs its engine, and none is attached any more; call "
            "trlpatch.attach_engine(model, llm)"
        )
    return engine


def save_lora(self: Module, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Save an adapter of this model as PEFT does: `adapter_model.safetensors` and `adapter_config.json`.

    The active adapter, unless `adapter_name` says another; in the dtype it is trained in.

    Raises:
        AdapterNotExpressible: the model has none, or it is sharded over ranks.
        InvalidOption: it has none of that name.
    """
    view = lora_view(self)
    if view is None:
        raise AdapterNotExpressible(
            f"model.save_lora({os.fspath(save_directory)!r}): {type(self).__name__} has no PEFT adapter to save; "
            "make one with peft.get_peft_model(model, LoraConfig(...))"
        )
    name = adapter_name or next(iter(view.active or view.configs))
    if name not in view.configs:
        raise InvalidOption(
            f"model.save_lora(adapter_name={name!r}): this model has {', '.join(view.configs) or 'no adapter'}"
        )
    by = view.weights(name).sharded
    if by is not None:
        raise AdapterNotExpressible(
            f"model.save_lora({os.fspath(save_directory)!r}): the adapter is sharded over ranks ({by}), and this rank "
            "has a part of it; expected trainer.save_model(directory), which every rank calls"
        )
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # The model inside PEFT's has to be saved from: a PEFT model made later is not known here.
    found = get_peft_model_state_dict(view.base, adapter_name=name, save_embedding_layers=False)
    tensors = {f"{PEFT_PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in found.items()}
    config = copy.copy(view.configs[name])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(view.base, "name_or_path", None)
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)


def _require_same_weights(base: Module, llm: RolloutEngine) -> None:
    """A model without an adapter is the policy by its own weights: are they the engine's?"""
    state = state_of(llm)
    if base in state.sharers:
        return
    if state.policy_location == "policy":
        _require_pushed_weights(base, state)
        return
    if base not in state.weights_attached:
        raise NotAnEngine(
            f"model.fast_generate: this {type(base).__name__} is a copy of a model that the engine was detached from, "
            "and nothing says that the engine has its weights; expected a model that the engine is attached to: call "
            "trlpatch.attach_engine(model, llm), which compares them"
        )
    changed = changed_parameter(state.weights_attached[base], base)
    if changed is not None:
        raise StaleAdapter(
            f"model.fast_generate: {changed!r} of this {type(base).__name__} is not what it was when the engine was "
            "attached (an adapter was merged into it, or it was trained), and it has no adapter that a request could "
            "carry: the engine would answer for the model as it was. Generate before merge_and_unload(), or save the "
            "model and build an engine of it; model.fast_generate(..., lora_request=None) asks the engine as it is"
        )


def _require_pushed_weights(base: Module, state: EngineState) -> None:
    of, weights = state.weights_pushed or (None, {})
    if of is not None and of() is base:
        changed = changed_parameter(weights, base)
        if changed is None:
            return
        why = f"{changed!r} has changed since then"
    else:
        why = "they were another model's, or an adapter was merged into them"
    raise StaleAdapter(
        f"model.fast_generate of a {type(base).__name__} without an adapter: the engine has the weights that the "
        f"trainer pushed at its last rollout, and {why}: it would answer for another model. Generate in the trainer, "
        "whose rollouts push first; or save the model and build an engine of it; "
        "model.fast_generate(..., lora_request=None) asks the engine as it is"
    )


def _fast_generate(self: Module, *args: Any, lora_request: LoraRequest | None = _LIVE, **kwargs: Any) -> Any:
    """`llm.generate(...)` with the live adapter; `lora_request=None` rolls out with the base model.

    An engine whose weights are the merged policy gets the base model's for that, and the policy's at the next rollout.

    An engine that sleeps is woken for it, and sleeps again afterwards.
    """
    llm = _require_attached(self)
    state = state_of(llm)
    occupied = state.occupancy.handing_over(llm.llm_engine, "model.fast_generate", abort=True, wait=True)
    with occupied, awake(llm, state, self):
        in_weights = state.policy_location == "weights" or state.torn
        if lora_request is None and in_weights:
            write_base(self, llm)
        if lora_request is not _LIVE or not in_weights:
            live_request.refuse_lost_weights(state)
        if lora_request is _LIVE:
            lora_request = None
            if lora_view(self) is None and not in_weights:
                _require_same_weights(self, llm)
            else:
                lora_request = live_request.require_request(self, llm)
        with state.as_asked():  # inside a trainer, too, None is the base model
            return llm.generate(*args, lora_request=lora_request, **kwargs)
