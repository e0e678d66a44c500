"""What of weight transfer this vLLM has. Its API came in four shapes; they are told apart by looking, not by version.

| vLLM | the session is | an engine of ours | NCCL on the trainer's side |
|---|---|---|---|
| below 0.22 | not there, or without begin and end | no | no |
| 0.23 | the worker's, which waits for an accelerator | no: a CPU has none | `trainer_send_weights` |
| 0.26 | the transfer engine's | yes | `trainer_send_weights` |
| 0.28 and newer | the same, and versions have names | yes | `WeightTransferTrainerFactory` |

Where there is no session for what is sent, functions of ours run in the worker (`loading`).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

BACKEND = "trlpatch_tensors"
"""Our name in vLLM's `WeightTransferEngineFactory`: tensors come with the update itself."""

Route = Literal["nccl", "tensors", "functions"]
"""How weights go into one engine: vLLM's session with its NCCL backend or with ours, or functions in the worker."""
NcclSide = Literal["trainer", "static", ""]
"""The trainer's side of vLLM's NCCL backend: a class with `send_weights`, static functions, or none."""


def session_is_the_engines() -> bool:
    """Does the transfer engine itself begin and end an update (vLLM 0.26+), so that one of ours can be registered?"""
    base = _module("vllm.distributed.weight_transfer.base")
    return hasattr(getattr(base, "WeightTransferEngine", None), "start_weight_update")


def worker_has_session() -> bool:
    """Has the worker `start_weight_update` (vLLM 0.23+)?"""
    worker = _module("vllm.v1.worker.gpu_worker")
    return hasattr(getattr(worker, "Worker", None), "start_weight_update")


def nccl_side() -> NcclSide:
    """How the trainer's side of vLLM's NCCL backend is called; "" where there is none."""
    nccl = _module("vllm.distributed.weight_transfer.nccl_engine")
    if hasattr(nccl, "NCCLTrainerWeightTransferEngine"):
        return "trainer"
    return "static" if hasattr(getattr(nccl, "NCCLWeightTransferEngine", None), "trainer_send_weights") else ""


def route_for(device: str, wanted: str = "auto") -> Route:
    """Choose how an engine on `device` ("cuda", "cpu") gets weights: NCCL on GPUs where vLLM has it.

    Raises:
        ValueError: `wanted` is none of "auto", "nccl", "tensors", or NCCL was asked for and cannot be had.
    """
    possible = device == "cuda" and worker_has_session() and bool(nccl_side())
    if wanted not in ("auto", "nccl", "tensors"):
        raise ValueError(f'weight_transfer={wanted!r}: expected "auto", "nccl" or "tensors"')
    if wanted == "nccl" and not possible:
        raise ValueError(
            f'weight_transfer="nccl": an engine on {device} with this vLLM has no NCCL weight transfer (it needs a '
            'GPU and vLLM 0.23 or newer); use "tensors", which goes through the object store of Ray'
        )
    if wanted != "tensors" and possible:
        return "nccl"
    return "tensors" if session_is_the_engines() else "functions"


def engine_arguments(route: Route, *, tensor_parallel_size: int = 1) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that a route needs; registers our backend in this process."""
    if route == "functions":
        return {}
    from vllm.config import WeightTransferConfig

    if route == "nccl":
        return {"weight_transfer_config": WeightTransferConfig(backend="nccl")}
    register()
    arguments: dict[str, Any] = {"weight_transfer_config": WeightTransferConfig(backend=BACKEND)}
    if tensor_parallel_size > 1:  # the workers' own processes import it, and with it register the backend
        arguments["worker_extension_cls"] = f"{__package__}.registered.Registers"
    return arguments


def register() -> None:
    """Make our backend known to vLLM in this process, once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, f"{__package__}.registered", "TensorTransferEngine")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
