"""`async_rollouts`: one call that makes AsyncGRPOTrainer roll out on Ray engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trlpatch.errors import AsyncNotSupported
from trlpatch.ray.async_grpo.callback import RolloutsCallback
from trlpatch.ray.async_grpo.protocols import AsyncEngines
from trlpatch.ray.async_grpo.samples import installed_release
from trlpatch.ray.async_grpo.transfer import ElsewhereTransfer, RayWeightTransfer
from trlpatch.ray.async_grpo.versions import PolicyVersions
from trlpatch.ray.async_grpo.worker import RayRolloutWorker


def async_rollouts(
    engines: AsyncEngines | None,
    reward_funcs: Any,
    train_dataset: Any,
    *,
    callbacks: Sequence[Any] = (),
    sampling_params: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Make the keyword arguments with which `AsyncGRPOTrainer` rolls out on these engines.

        AsyncGRPOTrainer(model, **trlpatch.ray.async_rollouts(engines, reward, dataset, args=config))

    `reward_funcs` are called in this process, lambdas and coroutines among them. `sampling_params` are arguments of
    `vllm.SamplingParams` beside those of AsyncGRPOConfig. All other arguments go to the trainer as they are. `engines`
    may be None on ranks other than 0, where the trainer has no use for them.

    Raises:
        AsyncNotSupported: this TRL is none of 1.6 to 1.16, or tools or an environment are asked for.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for name in ("tools", "environment_factory"):
        if arguments.get(name):
            raise AsyncNotSupported(
                f"AsyncGRPOTrainer({name}=...) on Ray engines: their conversations have one turn; nothing was set up. "
                "Use TRL's own worker with a vLLM server, or GRPOTrainer on `attach_engine(model, engines)`"
            )
    if not functions or not all(callable(function) for function in functions):
        raise AsyncNotSupported(
            "AsyncGRPOTrainer on Ray engines: expected one reward function or a list of them, found "
            f"{reward_funcs!r}; nothing was set up"
        )
    if train_dataset is None:
        raise AsyncNotSupported("AsyncGRPOTrainer on Ray engines: train_dataset is None; nothing was set up")
    release = installed_release()
    given: dict[str, Any] = {**arguments, "reward_funcs": functions, "train_dataset": train_dataset}
    if engines is None:
        given["callbacks"] = [*callbacks, RolloutsCallback(None, None)]
        # From TRL 1.14 on ranks without one wait for what rank 0 found out about its server: rank 0 has none to ask.
        return given | ({"weight_transfer": ElsewhereTransfer()} if release.takes_transfer else {})
    versions = PolicyVersions()
    worker = RayRolloutWorker(engines, train_dataset, functions, release=release, versions=versions)
    transfer = RayWeightTransfer(engines, versions)
    callback = RolloutsCallback(worker, transfer, engines.infos, sampling_params)
    given |= {"callbacks": [*callbacks, callback], "rollout_worker": worker}
    if release.takes_transfer:
        given["weight_transfer"] = transfer
    return given
