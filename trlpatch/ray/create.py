"""Create rollout engines on Ray actors."""

from __future__ import annotations

from typing import Any

from trlpatch.ray.engines import RayEngines
from trlpatch.ray.timeouts import Timeouts


def create_engines(
    model: str,
    num_engines: int = 1,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    *,
    timeouts: Timeouts | None = None,
    **engine_arguments: Any,
) -> RayEngines:
    """Build `num_engines` engines of `model`, each a `vllm.LLM` in a Ray actor with GPUs of its own.

    Raises:
        RayNotInstalled: Ray is missing.
        NotEnoughResources: the cluster has too few GPUs or CPUs.
        EngineInitFailed: an engine did not come up in `timeouts.init` seconds.
    """
    raise NotImplementedError
