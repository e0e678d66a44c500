"""The rollout backend of engines on Ray actors: nothing of theirs is in this process, nor on the trainer's GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlpatch.engine.adapter_sync.protocol import AdapterSync
from trlpatch.engine.llm_backend import LLMBackend
from trlpatch.engine.memory import device
from trlpatch.engine.probes import SLEEP_TAGS
from trlpatch.engine.protocols import WeightTransfer
from trlpatch.errors import CannotShare
from trlpatch.policy.adapter import LoraView
from trlpatch.ray.adapter_sync import RayAdapterSync
from trlpatch.ray.transfer.policy_transfer import PolicyTransfer
from trlpatch.ray.transfer.sender import WeightSender

if TYPE_CHECKING:
    from torch.nn import Module

    from trlpatch.ray.protocols import Engines


class RayBackend(LLMBackend):
    """See `RolloutBackend`."""

    def __init__(self, engines: Any) -> None:
        super().__init__(engines)
        self._inner = engines.llm_engine
        self._transfer: PolicyTransfer | None = None

    @property
    def location(self) -> str:  # type: ignore[override]
        """How many actors, and where."""
        engines: Any = self._engine()
        return "Ray actors that are gone" if engines is None else str(engines.location)

    @property
    def _engines(self) -> Engines:
        engines: Any = self.engine
        found: Engines = engines
        return found

    def new_adapter_sync(self) -> AdapterSync:
        """By message; each engine chooses for itself how it takes what arrives."""
        return RayAdapterSync(self._engines)

    def adapter_misfit(self, directory: Path) -> str | None:
        """Nothing to compare with."""
        return None

    def base_mismatch(self, view: LoraView) -> str | None:
        """Nothing to compare with: the log-probabilities of every engine were compared when they were attached."""
        return None

    def lora_layers(self) -> str | None:
        """As the first engine says."""
        return self._engines.infos[0].lora_layers

    def before_weight_push(self) -> None:
        """Wait for this process's kernels: every engine takes weights between two steps."""
        self.drain()

    def weight_transfer(self) -> WeightTransfer | None:
        """By messages, or over NCCL; None where nobody sends weights to them."""
        sender = self._engines.weight_sender
        if self._transfer is None and isinstance(sender, WeightSender):
            self._transfer = PolicyTransfer(self._engines, sender)
        return self._transfer

    def worker_model(self) -> Module:
        """It is elsewhere."""
        raise CannotShare("the engines are Ray actors with memory of their own")

    def drain(self) -> None:
        """Wait for this process's kernels: steps of an engine are its own business."""
        device.synchronize()

    def kv_sleep_unsupported_reason(self) -> str | None:
        """Nothing is gained by it."""
        return "the engines have devices of their own"

    def wake(self, tag: str) -> None:
        """Have every engine map one pool."""
        self.engine.wake_up(tags=[tag])

    def weights_bytes(self) -> int | None:
        """The pools are elsewhere."""
        return None

    @property
    def wakes(self) -> Any:
        """Every wake passes through what stands for `LLMEngine`."""
        return self._inner

    def guarded_wake(self, original: Callable[..., Any], tags: Collection[str] | None = None) -> Any:
        """Wake what sleeps, and nothing else."""
        wanted = set(SLEEP_TAGS if tags is None else tags)
        sleeping = wanted & self._asleep
        if not sleeping:
            return None
        result = original(None if tags is None else sorted(sleeping))
        self._asleep -= wanted
        return result
