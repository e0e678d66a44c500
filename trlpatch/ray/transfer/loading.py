"""Load a whole policy into the model of one worker of vLLM's, in parts. Runs in the worker's process.

`*_in_worker` are what `collective_rpc` calls where vLLM has no session for it; the engine core is in the actor's
process, so that functions can be given to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trlpatch.engine.single_adapter.storage import rows_follow_loading
from trlpatch.engine.weights_in_place import reload

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Weights = list[tuple[str, "Tensor"]]
"""Names as checkpoints have them, and whole tensors."""

_LAYERWISE = "_trlpatch_layerwise"
"""Of a worker: parameters are on the meta device while an update is open, and do not say where they belong."""


def unsupported_reason(module: Module) -> str | None:
    """Why no weights can be loaded into this model; None when they can."""
    if needs_layerwise(module):
        return reload.unsupported_reason(module)
    return reload.lora_loader_reason(module)


def needs_layerwise(module: Module) -> bool:
    """Are the weights in a form of vLLM's own, as those of its CPU backend, which no loader can write into?"""
    return any(parameter.device.type == "cpu" for parameter in module.parameters())


def begin(module: Module) -> None:
    """Take the packed tensors away: from here on until `finish` the model computes nothing."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    with _plain_tensors():
        initialize_layerwise_reload(module)


def load(module: Any, weights: Weights) -> None:
    """Load some of the weights, each whole."""
    with _plain_tensors(), rows_follow_loading():
        module.load_weights(weights)


def finish(module: Module, model_config: Any) -> None:
    """Pack what is left and put the tensors back that the model computes with."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with _plain_tensors(), rows_follow_loading():
        finalize_layerwise_reload(module, model_config)
        reload.pack_tied(module)


def refusal_in_worker(worker: Any) -> str | None:
    """As `unsupported_reason`."""
    return unsupported_reason(worker.get_model())


def begin_in_worker(worker: Any) -> None:
    """As `begin`, where it is needed: elsewhere loaders write into the tensors that the model computes with."""
    module = worker.get_model()
    layerwise = needs_layerwise(module)
    if layerwise:
        begin(module)
    setattr(worker, _LAYERWISE, layerwise)


def load_in_worker(worker: Any, weights: Weights) -> None:
    """As `load`."""
    load(worker.get_model(), weights)


def finish_in_worker(worker: Any) -> None:
    """As `finish`, where `begin_in_worker` began something."""
    if getattr(worker, _LAYERWISE):
        finish(worker.get_model(), worker.model_config)


def disconnect_worker(worker: Any) -> None:
    """Give back what a transfer engine has open; only vLLM 0.32 has a method of the worker's for it."""
    if worker.weight_transfer_engine is not None:
        worker.weight_transfer_engine.shutdown()


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """For the time of a `with`: tensors that are made can be written later, and nothing is differentiated."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield
