"""Configure hook, at the head of a trainer's `__init__`: switch vLLM on for a model that carries an engine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from trlpatch.engine import probes
from trlpatch.engine.attach import attached_engine
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.engine.sharing import check_frozen
from trlpatch.engine.state import state_of
from trlpatch.errors import ArgsRequired, EngineMismatch, EngineWithoutSleep, ServerModeSamplingParams
from trlpatch.hooks import ranks
from trlpatch.hooks.prompt_length import bound_model_length
from trlpatch.hooks.protocols import TrainerArguments, TrainerLike
from trlpatch.hooks.sampling import normalize_sampling
from trlpatch.hooks.sampling_checks import check_sampling
from trlpatch.hooks.trainers import is_excluded_trainer
from trlpatch.log import log_once, warn_once
from trlpatch.options import active
from trlpatch.policy.adapter import base_of
from trlpatch.trl_names import LEFT_ALONE_REASON

if TYPE_CHECKING:
    from torch.nn import Module

_DEMANDED = ("on", "kv")

# TRL's fields for the engine that it builds, and what vLLM calls them; a tensor parallel size that differs is refused.
_OF_TRLS_ENGINE = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_max_model_length": "max_model_len",
    "vllm_max_model_len": "max_model_len",
    "vllm_model_impl": "model_impl",
    "vllm_dtype": "dtype",
    "vllm_device": "device",
    "vllm_enable_prefix_caching": "enable_prefix_caching",
}
_OF_A_SERVER = ("vllm_server_", "vllm_group_")


def configure(trainer: TrainerLike, model: Module | str | None, args: TrainerArguments | None) -> None:
    """Set `use_vllm`, `vllm_mode` and `vllm_enable_sleep_mode` on `args` where these fields exist.

    Done when `model` carries an engine, or with colocate="always"; never for NashMD and XPO, never over an
    explicit server. `trainer` is not initialised yet.

    Raises:
        ArgsRequired: `args` is None, and TRL would build arguments without vLLM; or it has no `use_vllm`.
        EngineWithoutSleep: `sleep=` demands an engine that can sleep.
        EngineMismatch: of another tensor parallel size, or built before the ranks met.
        SharedWeights: a base weight shared with the engine is trainable.
        ServerModeSamplingParams: `vllm_sampling_params` would not reach a server.
    """
    ranks.remember()
    engine = attached_engine(model) if active().colocate != "never" else None
    if is_excluded_trainer(trainer):
        if engine is not None:
            warn_once(trainer, f"{type(trainer).__name__}: the attached engine is not used: {LEFT_ALONE_REASON}")
        return
    wanted = engine is not None or active().colocate == "always"
    if args is None:
        if wanted:
            raise ArgsRequired(
                f"{type(trainer).__name__}(args=None): TRL would build default arguments with use_vllm=False after "
                "this point, and the engine would stay unused; pass args, e.g. "
                f"args={type(trainer).__name__.removesuffix('Trainer')}Config(output_dir=...)"
            )
        return
    if not hasattr(args, "use_vllm"):
        if engine is not None:
            raise ArgsRequired(
                f"{type(trainer).__name__}(args={type(args).__name__}(...)): the model carries an engine, and these "
                "arguments have no field use_vllm to switch it on with; rollouts would come from elsewhere. Pass "
                f"{type(trainer).__name__.removesuffix('Trainer')}Config(output_dir=...), or take the engine off with "
                "trlpatch.detach_engine(model)"
            )
        if wanted:
            warn_once(
                trainer,
                f'{type(trainer).__name__}: colocate="always" has no effect, because {type(args).__name__} has no '
                "field use_vllm",
            )
        return
    if wanted and not _explicit_server(args):
        args.use_vllm = True
        if hasattr(args, "vllm_mode"):
            args.vllm_mode = "colocate"
        if engine is not None:
            ranks.require_process_group(trainer)
            check_frozen(model)
            if base_of(model) in state_of(engine).sharers:
                ranks.require_unsharded_arguments(trainer, args)
            _match(trainer, args, engine)
            # Engines that have something to do beside each step of a trainer.
            prepare = getattr(engine, "prepare_trainer", None)
            if callable(prepare):
                prepare(trainer, args)
    elif wanted:
        log_once(
            trainer,
            f"{type(trainer).__name__}: the attached engine is not used, args ask for a vLLM server "
            "(vllm_mode='server')",
            level=logging.WARNING,
        )
    if engine is None:
        bound_model_length(args)
    if args.use_vllm and getattr(args, "vllm_mode", "colocate") == "colocate":
        _sleep_mode(trainer, args, engine)
    _take_sampling_params(trainer, args)
    if args.use_vllm and getattr(args, "vllm_mode", "colocate") == "colocate":
        check_sampling(trainer, args, engine, model)


def _default(args: TrainerArguments, name: str) -> object:
    field = getattr(type(args), "__dataclass_fields__", {}).get(name)
    return None if field is None else field.default


def _explicit_server(args: TrainerArguments) -> bool:
    """Did the user choose the server? It is the default up to TRL 0.29, so more has to say so there."""
    if getattr(args, "vllm_mode", None) != "server":
        return False
    if _default(args, "vllm_mode") == "colocate" or getattr(args, "vllm_server_base_url", None):
        return True
    return any(getattr(args, name, None) != _default(args, name) for name in ("vllm_server_host", "vllm_server_port"))


def _match(trainer: TrainerLike, args: TrainerArguments, engine: RolloutEngine) -> None:
    """Refuse or report settings of the arguments that the attached engine does not follow."""
    state_of(engine).attached = True
    size, asked = probes.tensor_parallel_size(engine), getattr(args, "vllm_tensor_parallel_size", None)
    if size is not None and asked is not None and size != asked:
        raise EngineMismatch(
            f"{type(trainer).__name__}: args.vllm_tensor_parallel_size={asked}, but the attached engine was built "
            f"with tensor_parallel_size={size}; TRL would gather prompts over the wrong ranks. Set "
            f"vllm_tensor_parallel_size={size}"
        )
    length = probes.max_model_len(engine)
    completion = getattr(args, "max_completion_length", None) or getattr(args, "max_new_tokens", None)
    if length is not None and completion is not None and completion >= length:
        warn_once(
            engine,
            f"completions of up to {completion} tokens were asked for, but the attached engine's max_model_len is "
            f"{length}, prompt included: longer ones are cut",
        )
    _report_ineffective(trainer, args, engine)


def _report_ineffective(trainer: TrainerLike, args: TrainerArguments, engine: RolloutEngine) -> None:
    """Warn of fields with which TRL would build an engine, or reach a server, where the attached one is otherwise."""
    built = probes.built_with(engine)
    names = [name for name in vars(args) if name in _OF_TRLS_ENGINE or name.startswith(_OF_A_SERVER)]
    changed = [
        name
        for name in names
        if (asked := getattr(args, name)) != _default(args, name)
        and (name not in _OF_TRLS_ENGINE or asked != built.get(_OF_TRLS_ENGINE[name]))
    ]
    if not changed:
        return
    listed = ", ".join(
        f"{name}={getattr(args, name)!r}"
        + (f" (the engine has {built[_OF_TRLS_ENGINE[name]]!r})" if _OF_TRLS_ENGINE.get(name) in built else "")
        for name in changed
    )
    warn_once(
        trainer,
        f"{type(trainer).__name__}: these arguments have no effect, because the attached engine is built: {listed}. "
        "Give them to vllm.LLM or to FastLanguageModel.from_pretrained",
    )


def _sleep_mode(trainer: TrainerLike, args: TrainerArguments, engine: RolloutEngine | None) -> None:
    """`vllm_enable_sleep_mode` := what the engine can do; without an engine only what `sleep=` demands."""
    wish = active().sleep
    able = None if engine is None else probes.sleep_enabled(engine)
    if wish in _DEMANDED and able is False:
        raise EngineWithoutSleep(
            f"{type(trainer).__name__}: sleep={wish!r}, but the attached engine was built without sleep; build it "
            'with vllm.LLM(..., enable_sleep_mode=True), or use PatchFastRL(sleep="auto")'
        )
    if not hasattr(args, "vllm_enable_sleep_mode"):
        return
    if wish != "auto":
        args.vllm_enable_sleep_mode = wish in _DEMANDED
    elif able is not None:
        if args.vllm_enable_sleep_mode and not able:
            warn_once(
                engine,
                "vllm_enable_sleep_mode=True is set to False: the attached engine was built without "
                "enable_sleep_mode=True, and vLLM cannot put it to sleep",
            )
        args.vllm_enable_sleep_mode = able


def _take_sampling_params(trainer: TrainerLike, args: TrainerArguments) -> None:
    # Set after the config was built, or by a config whose own __post_init__ replaces TRL's (MiniLLM, 0.26-1.14).
    normalize_sampling(args)
    if not getattr(args, "vllm_sampling_params", None):
        return
    name = type(trainer).__name__
    if not args.use_vllm:
        warn_once(args, f"{name}: vllm_sampling_params has no effect, because use_vllm is False")
    elif getattr(args, "vllm_mode", "colocate") == "server":
        raise ServerModeSamplingParams(
            f"{name}: vllm_sampling_params reaches in-process engines only, and args.vllm_mode is 'server'; "
            "use TRL's own fields and generation_kwargs, which are sent to the server"
        )
