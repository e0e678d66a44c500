"""Rollout function hook: what a user's `rollout_func` generates carries the adapter being trained."""

from __future__ import annotations

import functools

from trlpatch.engine import guards
from trlpatch.engine.attach import attached_engine
from trlpatch.engine.state import state_of
from trlpatch.errors import RolloutFuncIgnored
from trlpatch.hooks.lora_request import lora_request, one_ranks_request
from trlpatch.hooks.protocols import RolloutFunc, TrainerArguments, TrainerLike
from trlpatch.hooks.sleep import sleep
from trlpatch.hooks.trainers import args_of, engine_of, model_of, serves_remotely
from trlpatch.log import log_once, warn_once
from trlpatch.policy.adapter import base_of
from trlpatch.policy.sharding import split_over_ranks


def rollout_func(trainer: TrainerLike, function: RolloutFunc | None) -> RolloutFunc | None:
    """What the trainer keeps as `rollout_func`: `function`, during which the engine supplies the live adapter.

    A request that says no adapter gets the one being trained, whatever calls the engine: `llm.generate`, `llm.chat`,
    `llm.llm_engine.add_request`, in any thread. One that names an adapter keeps it. The base model is what
    `model.fast_generate(..., lora_request=None)` and `with model.disable_adapter():` ask for. Afterwards the engine
    sleeps if the trainer's engines sleep: TRL leaves that to the function.

    Raises:
        StaleAdapter: as `one_ranks_request` does, where the function generates.
    """
    if function is None:
        return None

    @functools.wraps(function)
    def live(*args: object, **kwargs: object) -> object:
        engine = engine_of(trainer)
        if engine is None or serves_remotely(trainer):
            return function(*args, **kwargs)
        state = state_of(engine)
        guards.install(engine, state)
        log_once(engine, "what rollout_func generates without a lora_request carries the adapter being trained")
        if split_over_ranks(base_of(model_of(trainer))):
            lora_request(trainer, engine)  # every rank is here, and need not be where the function generates
        with state.supplying(lambda: one_ranks_request(trainer, engine)):
            result = function(*args, **kwargs)
        if getattr(args_of(trainer), "vllm_enable_sleep_mode", False):
            sleep(trainer, engine, level=2)
        return result

    return live


def rollout_func_server(
    trainer: TrainerLike, model: object, args: TrainerArguments, function: RolloutFunc | None
) -> RolloutFunc | None:
    """`function`, which TRL 0.25 calls in server mode only.

    Warns when the arguments ask for work in process.

    Raises:
        RolloutFuncIgnored: an engine is attached to `model`, which is what makes the trainer work in process.
    """
    if function is None or not args.use_vllm or args.vllm_mode == "server":
        return function
    message = (
        f"{type(trainer).__name__}(rollout_func=...): TRL 0.25 calls it in server mode only, and would generate "
        "without it in process; use TRL 0.26 or newer, or a vLLM server"
    )
    if attached_engine(model) is not None:
        raise RolloutFuncIgnored(f"{message} and a model without an attached engine")
    warn_once(trainer, message)
    return function
