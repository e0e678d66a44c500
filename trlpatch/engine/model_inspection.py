"""vLLM's inspection of a model class, in this process: a start without a second interpreter that imports vLLM."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


@contextlib.contextmanager
def inspected_here(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let `vllm.LLM(**arguments)`, built inside the block, import its model class here and not in a subprocess.

    To learn what a model class can do, vLLM imports it in a subprocess (`_run_in_subprocess` in
    vllm/model_executor/models/registry.py), lest the import initialises CUDA before workers are forked. That costs an
    import of torch and vLLM, at every start for which `VLLM_CACHE_ROOT/modelinfos` has no entry: in each new container
    or notebook machine. A worker in this process imports the same module a moment later anyway.
    """
    registry = _registry() if _worker_is_here(arguments) else None
    if registry is None:
        yield
        return
    theirs = registry._run_in_subprocess
    registry._run_in_subprocess = _run_here
    try:
        yield
    finally:
        registry._run_in_subprocess = theirs


def _registry() -> Any:
    """vLLM's module of model classes, or None where it has no such subprocess."""
    try:
        from vllm.model_executor.models import registry
    except ImportError:
        return None
    return registry if hasattr(registry, "_run_in_subprocess") else None


def _run_here(inspect: Callable[[], _T]) -> _T:
    return inspect()


def in_process(arguments: Mapping[str, Any]) -> bool:
    """Whether executor and engine core of `vllm.LLM(**arguments)` are in this process.

    For "external_launcher", which TRL's own engines have, vLLM sets VLLM_ENABLE_V1_MULTIPROCESSING to 0 by itself
    while it is built (ParallelConfig, 0.8 and newer).
    """
    backend = arguments.get("distributed_executor_backend")
    if backend == "external_launcher":
        return True
    return backend in (None, "uni") and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


def is_parallel(arguments: Mapping[str, Any]) -> bool:
    """Whether the model of `vllm.LLM(**arguments)` is spread over several devices."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    return any((arguments.get(size) or 1) != 1 for size in sizes)


def _worker_is_here(arguments: Mapping[str, Any]) -> bool:
    if arguments.get("distributed_executor_backend") == "external_launcher":
        return True
    return in_process(arguments) and not is_parallel(arguments)
