"""Create rollout engines on Ray actors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trlpatch.engine.build import lora_arguments
from trlpatch.engine.cudagraphs import compilation_config
from trlpatch.log import logger
from trlpatch.ray import cluster
from trlpatch.ray.actor import CONTROL, ROLLOUTS, LLMRayActor
from trlpatch.ray.bounded import bounded
from trlpatch.ray.engines import RayEngines, all_engines
from trlpatch.ray.environment import engine_environment, engine_port
from trlpatch.ray.fleet import RayCluster
from trlpatch.ray.plan import Need, require_others, require_room
from trlpatch.ray.supervision import Supervisor
from trlpatch.ray.timeouts import Timeouts
from trlpatch.ray.transfer.sender import WeightSender

_THREADS = {CONTROL: 4, ROLLOUTS: 64}
"""Calls that an actor answers at a time. The default group has one: updates keep their order."""
_RESERVATION = 60.0
"""Seconds for a placement group whose resources are free."""


def create_engines(
    model: str | os.PathLike[str],
    num_engines: int = 1,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    *,
    max_lora_rank: int = 64,
    enable_lora: bool = True,
    lora_layers: str = "auto",
    prefetch: int = 0,
    weight_transfer: str = "auto",
    timeouts: Timeouts | None = None,
    environment: Mapping[str, str] | None = None,
    ray_options: Mapping[str, Any] | None = None,
    **engine_arguments: Any,
) -> RayEngines:
    """Build `num_engines` engines of `model`, each a `vllm.LLM` in a Ray actor with GPUs of its own.

    Args:
        model: as `vllm.LLM`'s; every node must be able to read it.
        num_engines: each answers a part of the prompts.
        tensor_parallel_size: GPUs of one engine, all on one node.
        gpu_memory_utilization: as in vLLM; nothing else runs on these GPUs.
        max_lora_rank: the largest rank of an adapter; rounded up to one that vLLM allows.
        enable_lora: False: full weights are all that these engines are given.
        lora_layers: as of `PatchFastRL`.
        prefetch: 1: GRPOTrainer's next batch is generated while it trains on this one, see docs/async.md.
        weight_transfer: how full weights travel: "nccl" by vLLM's transfer, "tensors" by Ray's object store, "auto" by
            NCCL on GPUs, where this vLLM has it. Adapters always go by the object store.
        timeouts: of the start, health checks, updates and rollouts.
        environment: variables for the engines' processes, which win over the trainer's and over the defaults.
        ray_options: of `ray.init`, where Ray does not run in this process yet.
        **engine_arguments: any other of `vllm.LLM`. `seed` is the first engine's; each has another one.

    The cluster is the one of RAY_ADDRESS, with nodes of other hosts, or is started on this host with all GPUs but the
    trainer's.

    Raises:
        RayNotInstalled: Ray is missing.
        NotEnoughResources: the cluster has too few GPUs or CPUs, with what is missing and what would fit.
        ClusterTimeout: Ray did not come up, or did not answer, in `timeouts.cluster` seconds.
        EngineInitFailed: an engine did not come up, or not in `timeouts.init` seconds; none is left.
    """
    arguments = _arguments(
        {"model": os.fspath(model), "tensor_parallel_size": tensor_parallel_size, **engine_arguments},
        gpu_memory_utilization,
        max_lora_rank if enable_lora else None,
    )
    engines = start_engines(
        arguments,
        num_engines,
        lora_layers=lora_layers,
        weight_transfer=weight_transfer,
        timeouts=timeouts,
        environment=environment,
        ray_options=ray_options,
    )
    engines.prefetch = prefetch
    return engines


def start_engines(
    arguments: Mapping[str, Any],
    num_engines: int,
    *,
    lora_layers: str = "auto",
    weight_transfer: str = "auto",
    timeouts: Timeouts | None = None,
    environment: Mapping[str, str] | None = None,
    ray_options: Mapping[str, Any] | None = None,
) -> RayEngines:
    """As `create_engines`, with all arguments of `vllm.LLM` as they are."""
    parallel = int(arguments.get("tensor_parallel_size") or 1)
    if num_engines < 1 or parallel < 1:
        raise ValueError(
            f"create_engines(num_engines={num_engines}, tensor_parallel_size={parallel}): expected 1 or more of each"
        )
    if parallel > 1:
        arguments = {"distributed_executor_backend": "mp", **arguments}
    limits = timeouts or Timeouts()
    ray = cluster.join(ray_options, limits)
    devices = cluster.on_devices()
    need = Need(parallel if devices else 0, parallel)
    trainer = cluster.trainer_device() if devices else None
    require_room(cluster.nodes(limits), num_engines, need, trainer=trainer if cluster.started_here() else None)
    variables = engine_environment(devices=devices) | dict(environment or {})
    group = cluster.placed(ray, num_engines, need, _RESERVATION, limits)
    started = Started(ray, need, group, arguments, variables, lora_layers, weight_transfer, limits)
    supervisor = Supervisor(started.actor, num_engines, limits, cluster=RayCluster(CONTROL))
    try:
        infos = supervisor.start()
        if trainer is not None:
            require_others((cluster.host(), trainer), [(info.node, info.devices) for info in infos])
    except BaseException:
        supervisor.shutdown()
        started.release()
        raise
    handles = [place.actor for place in supervisor.places]
    engines = RayEngines(handles, infos, limits, release=started.release, supervisor=supervisor)
    engines.weight_sender = WeightSender(engines)
    logger.info("%r is up", engines)
    return engines


class Started:
    """How the engines were started, to start one of them again."""

    def __init__(
        self,
        ray: Any,
        need: Need,
        group: Any,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        lora_layers: str,
        weight_transfer: str,
        limits: Timeouts,
    ) -> None:
        self._ray = ray
        self._need = need
        self._group = group
        self._arguments = arguments
        self._environment = environment
        self._lora_layers = lora_layers
        self._weight_transfer = weight_transfer
        self._limits = limits

    def actor(self, index: int) -> Any:
        """Start the engine at `index` in its place; `ready` of the handle waits for it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        make = self._ray.remote(concurrency_groups=_THREADS, max_restarts=0)(LLMRayActor)
        seed = self._arguments.get("seed")
        arguments = {**self._arguments, "seed": int(seed or 0) + index}
        return make.options(
            num_cpus=self._need.cpus,
            num_gpus=self._need.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group,
                placement_group_bundle_index=index,
                placement_group_capture_child_tasks=True,
            ),
        ).remote(
            index,
            arguments,
            engine_port(index) | dict(self._environment),
            layers=self._lora_layers,
            weight_transfer=self._weight_transfer,
        )

    def release(self) -> None:
        """Give the reserved resources back; where Ray does not answer they are its until this process has ended."""
        if not self._ray.is_initialized():
            return
        try:
            bounded("giving resources back", lambda: self._ray.util.remove_placement_group(self._group), self._limits)
        except Exception as error:  # Ray's own limit is shorter at times, and has an error of its own
            logger.warning("the resources of rollout engines were not given back: %s", error)


def shutdown() -> None:
    """End all engines of this process, and the Ray cluster if it was started for them."""
    for engines in all_engines():
        engines.shutdown()
    cluster.leave()


def _arguments(given: dict[str, Any], gpu_memory_utilization: float, max_lora_rank: int | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization, "disable_log_stats": True}
    lora = lora_arguments(max_lora_rank or 8)
    if max_lora_rank is None:
        lora = {name: value for name, value in lora.items() if "lora" not in name}
    arguments |= {**lora, **given}
    if graphs := compilation_config(arguments):
        arguments["compilation_config"] = graphs
    return arguments
