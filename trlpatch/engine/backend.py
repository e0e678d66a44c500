"""Rollout backend: everything that depends on where an engine's workers run, behind one interface.

`backend_of(engine)` chooses once per engine, and nobody else asks where a worker is. A rollout engine of another kind
(actors of a cluster, a remote server) is one more implementation and one more line in `choose_backend`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trlpatch.engine import probes
from trlpatch.engine.adapter_sync.protocol import AdapterSync
from trlpatch.engine.inprocess import InProcessBackend
from trlpatch.engine.protocols import RolloutEngine, WeightTransfer
from trlpatch.engine.workers import ExecutorBackend, WorkersBackend
from trlpatch.policy.adapter import LoraView

if TYPE_CHECKING:
    from torch.nn import Module


class RolloutBackend(Protocol):
    """One engine as trainers need it, wherever its workers are. Holds no strong reference to the `vllm.LLM`."""

    @property
    def location(self) -> str:
        """Where the workers run, for `trlpatch.status()`; empty in this process."""

    # Adapters and weights.

    def new_adapter_sync(self) -> AdapterSync:
        """Choose the best way of adapter sync for this engine; the caller keeps it."""

    def adapter_misfit(self, directory: Path) -> str | None:
        """Why a saved adapter is not of the engine's model; None when it is, and where that cannot be looked into."""

    def base_mismatch(self, view: LoraView) -> str | None:
        """Why the engine's base weights are not those under the adapter; None when they are, or cannot be compared."""

    def lora_layers(self) -> str | None:
        """Whose LoRA layers the engine has, in words; None where that cannot be looked into."""

    def before_weight_push(self) -> None:
        """Make sure that all weights can be written: nothing is in flight. The weights are awake."""

    def weight_transfer(self) -> WeightTransfer | None:
        """How whole policies are sent to it; None where they are written in place, or not at all."""

    def worker_model(self) -> Module:
        """The torch module that the worker runs, to share its storage.

        Raises:
            CannotShare: it is not in this process.
        """

    # Requests.

    def drain(self) -> None:
        """Wait until nothing is in flight and the device is idle; unfinished requests stay as they are."""

    def unfinished(self) -> bool:
        """Tell whether requests have been added and not answered to their end."""

    def require_idle(self) -> None:
        """See that memory of the engine can be unmapped.

        Raises:
            EngineBusy: requests are unfinished.
        """

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False when they are in use and were not forgotten."""

    # Pools of device memory ("weights", "kv_cache").

    def asleep(self) -> set[str]:
        """The pools that are unmapped now."""

    def unmapped(self) -> set[str]:
        """As `asleep`, with pools of names that trlpatch does not know."""

    def kv_sleep_unsupported_reason(self) -> str | None:
        """Why the engine cannot give back its KV cache alone; None when it can."""

    def discard_kv_cache(self) -> int:
        """Unmap the KV cache of an engine that is awake; return the bytes given back on all its devices.

        The prefix, multi-modal and encoder caches are reset first: they would name memory whose contents are gone.

        Raises:
            EngineBusy: requests are unfinished; nothing is marked asleep then.
        """

    def mark_asleep(self) -> None:
        """Both pools were unmapped by the engine's own `sleep`."""

    def wake(self, tag: str) -> None:
        """Map one pool that is unmapped.

        Raises:
            NotEnoughMemory: the device has no room for it; the engine is as asleep as before then.
        """

    def mark_awake(self, tag: str) -> None:
        """One pool is mapped, whoever did it."""

    def weights_bytes(self) -> int | None:
        """The size of the engine's pools but the KV cache's, in bytes; None when they are not in this process."""

    # Guards.

    @property
    def wakes(self) -> Any:
        """The object whose `wake_up` every wake of this engine passes, to be guarded with `guarded_wake`."""

    def guarded_wake(self, original: Callable[..., Any], tags: Collection[str] | None = None) -> Any:
        """Wake by way of vLLM's `original`: what is mapped is not mapped again, and what fails leaves nothing half."""


_backends: weakref.WeakKeyDictionary[RolloutEngine, RolloutBackend] = weakref.WeakKeyDictionary()


def backend_of(engine: RolloutEngine) -> RolloutBackend:
    """The one backend of this engine, chosen when it is first asked for."""
    backend = _backends.get(engine)
    if backend is None:
        backend = _backends[engine] = choose_backend(engine)
    return backend


def choose_backend(engine: RolloutEngine) -> RolloutBackend:
    """Look where the executor and its workers are: the only place that does.

    An engine of another kind brings its backend along: `engine.rollout_backend()`.
    """
    own = getattr(engine, "rollout_backend", None)
    if callable(own):
        brought: RolloutBackend = own()
        return brought
    executor = probes.executor(engine)
    if executor is None:
        return WorkersBackend(engine)
    if probes.reach(executor, "driver_worker") is None:
        return ExecutorBackend(engine, executor)
    return InProcessBackend(engine, executor)


def forget_backend(engine: RolloutEngine) -> None:
    """Drop the backend of an engine, and what it knew of its sleep; the next `backend_of` chooses again."""
    _backends.pop(engine, None)
