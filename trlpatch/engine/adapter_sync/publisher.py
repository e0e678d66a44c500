"""Handing a LoRA adapter to an engine: one interface, several ways, unknown outside this room."""

from __future__ import annotations

import logging
import weakref
from typing import Any, Protocol

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.adapter_sync.adapter_files import AdapterFiles
from trlpatch.engine.adapter_sync.buffer_copy import BufferCopy
from trlpatch.engine.adapter_sync.registration import Registration
from trlpatch.engine.drain import drain
from trlpatch.engine.state import EngineState, Published, state_of
from trlpatch.errors import StaleAdapter
from trlpatch.log import log_once
from trlpatch.policy.adapter import LoraView, LoraWeights
from trlpatch.policy.change_detection import fingerprint

__all__ = [
    "AdapterFiles",
    "AdapterSync",
    "BufferCopy",
    "Registration",
    "choose_adapter_sync",
    "current_request",
    "publish",
]


class AdapterSync(Protocol):
    """One way of getting an adapter into an engine."""

    @property
    def description(self) -> str:
        """Which way it is, and why not a better one, in a few words."""

    def publish(self, weights: LoraWeights) -> Any:
        """Make the adapter servable as it is now and return a `LoRARequest` for it, with a name never used before.

        The version published before is gone then: a request for it may not be used any more. The weights are read
        only. Raises AdapterNotExpressible when the engine has no place for one of the adapted modules; the version
        published before then still stands.
        """

    def holds(self, request: Any) -> bool:
        """Is the adapter of this request still servable? vLLM may have evicted it for another one."""


def choose_adapter_sync(engine: Any) -> AdapterSync:
    """In place when the engine's worker is in this process, else through files."""
    if probes.worker_lora_manager(engine) is not None:
        return BufferCopy(engine)
    log_once(
        engine,
        "the engine's worker runs in another process: adapters are handed over through files in a private directory",
        level=logging.INFO,
    )
    return AdapterFiles(engine)


def publish(view: LoraView, model: Any, engine: Any) -> Any:
    """Hand the active adapter of `model` to the engine, drained first, whose weights must be awake; its request."""
    state = state_of(engine)
    if state.handover is None:
        state.handover = choose_adapter_sync(engine)
    drain(engine)
    mark = fingerprint(view)  # before the copies are made: a later change must not look published
    request = state.handover.publish(view.weights(view.active[0]))
    if not registry.names_separate_prefixes() and engine.reset_prefix_cache() is False:
        state.published = None
        raise StaleAdapter(
            "handing the adapter over: this vLLM would reuse cached prefixes of the version before, and refuses to "
            "drop them while requests are unfinished; finish or abort them first"
        )
    state.published = Published(request, mark, weakref.ref(model))
    state.holds = "adapter"
    return request


def current_request(view: LoraView, model: Any, state: EngineState) -> Any:
    """The request of the adapter as it is now, or None when it has to be handed over (again) first.

    Waits for the device: what was handed over has arrived when it returns.
    """
    published = state.published
    if published is None or state.handover is None or published.model() is not model:
        return None
    if not state.handover.holds(published.request) or published.fingerprint != fingerprint(view):
        return None
    return published.request
