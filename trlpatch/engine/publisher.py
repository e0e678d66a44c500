"""Publish the live LoRA adapter to an engine, and tell whether what was published is still current."""

from __future__ import annotations

import weakref

from trlpatch.engine import rank_agreement
from trlpatch.engine.adapter_sync import registry
from trlpatch.engine.adapter_sync.adapter_files import AdapterFiles
from trlpatch.engine.adapter_sync.buffer_copy import BufferCopy
from trlpatch.engine.adapter_sync.protocol import AdapterSync
from trlpatch.engine.adapter_sync.registration import Registration
from trlpatch.engine.protocols import LoraRequest, RolloutEngine
from trlpatch.engine.state import Published, state_of
from trlpatch.errors import StaleAdapter
from trlpatch.policy.adapter import CopyUnderway, LoraSnapshot, LoraView
from trlpatch.policy.change_detection import fingerprint
from trlpatch.policy.gathering import gather

__all__ = ["AdapterFiles", "AdapterSync", "BufferCopy", "Registration", "current_request", "publish", "start"]


def start(engine: RolloutEngine) -> CopyUnderway | None:
    """Begin to hand over what was handed over last, so that the device works while the host looks at the model.

    Give it to the snapshot of the model that is then published, in the same call: `view.snapshot(start(engine))`.
    None before the first hand-over, while requests run and where nothing can be done ahead: of shards there is only a
    copy here, which says nothing new. The engine's weights must be awake.
    """
    state = state_of(engine)
    sync, published = state.adapter_sync, state.published
    if published is None or published.fingerprint is not None or sync is None or not sync.compares:
        return None
    if state.backend.unfinished():
        return None
    state.backend.drain()
    return sync.start()


def publish(view: LoraView, model: object, engine: RolloutEngine) -> LoraRequest:
    """Hand the active adapter of `model` to the engine, drained first, whose weights must be awake; its request.

    A sharded adapter is gathered, unless no rank's part of it has moved: with `view.every_rank` only.

    Raises:
        AdapterNotExpressible: the engine has no place for one of the adapted modules.
        EngineMismatch: its place for one of them has another shape.
        StaleAdapter: cached prefixes of the version before cannot be dropped, or the engine is gone; or the adapter is
            sharded and other ranks may be elsewhere.
    """
    state = state_of(engine)
    backend = state.backend
    if state.adapter_sync is None:
        state.adapter_sync = backend.new_adapter_sync()
    sync, weights = state.adapter_sync, view.weights(view.active[0])
    underway = view.underway if isinstance(view, LoraSnapshot) else None
    mark = None
    if weights.sharded:
        request = current_request(view, model, engine)
        if request is not None:
            return request
        rank_agreement.require_together(view, model)
        mark = fingerprint(view)  # before the collective: a later change must not look published
        weights = gather(weights)
    rank_agreement.number_alike(view, engine)
    request = None if underway is None else underway.finish(weights)
    if request is None:
        backend.drain()
        if mark is None and not sync.compares:
            mark = fingerprint(view)  # before the copies: a later change must not look published
        request = sync.publish(weights)
    if mark is None and not sync.compares:  # it has just found out that it cannot
        mark = fingerprint(view)
        request = sync.publish(weights)
    published, state.published = state.published, None
    known = published is not None and published.request is request
    if not known and not registry.names_separate_prefixes() and not backend.reset_prefix_cache():
        raise StaleAdapter(
            "handing the adapter over: this vLLM would reuse cached prefixes of the version before, and refuses to "
            "drop them while requests are unfinished; finish or abort them first"
        )
    state.published = Published(request, mark, weakref.ref(model))
    state.policy_location = "adapter"
    rank_agreement.wait_for_engine_ranks(view, engine)
    return request


def current_request(view: LoraView, model: object, engine: RolloutEngine) -> LoraRequest | None:
    """The request of the adapter as it is now, or None when it has to be handed over (again) first.

    Waits for the device: what was handed over has arrived when it returns. Where handing over is the check, that is
    what it does. Of a sharded adapter each rank looks at its own part. With `view.every_rank` it is None on all of
    them as soon as one has to hand over: a rank that gathered alone would wait for the others for ever.
    """
    request = _current_here(view, model, engine, bool(view.sharded))
    return None if rank_agreement.agreed(view, engine, request is None) else request


def _current_here(view: LoraView, model: object, engine: RolloutEngine, sharded: bool) -> LoraRequest | None:
    state = state_of(engine)
    published = state.published
    if published is None or state.adapter_sync is None or published.model() is not model:
        return None
    if not state.adapter_sync.holds(published.request):
        return None
    if state.adapter_sync.compares and not sharded:
        return publish(view, model, engine)
    return published.request if published.fingerprint == fingerprint(view) else None
