"""`RayWeightTransfer`: TRL's `WeightTransferProtocol` on Ray engines. An adapter alone where the policy is LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trlpatch.errors import RankAboveEngine
from trlpatch.log import log_once
from trlpatch.policy import lora_support
from trlpatch.policy.adapter import lora_view
from trlpatch.ray.async_grpo.merging import leave_unmerged
from trlpatch.ray.async_grpo.protocols import AsyncEngines
from trlpatch.ray.async_grpo.versions import PolicyVersions

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.engine.adapter_sync.protocol import AdapterSync
    from trlpatch.policy.adapter import LoraView


class ElsewhereTransfer:
    """Of ranks other than 0: says that weights are no matter of a vLLM server. The trainer keeps it on no rank."""


class RayWeightTransfer:
    """Sends the policy to every engine, between two of their steps: requests in flight go on with it.

    Given to `AsyncGRPOTrainer(weight_transfer=...)` by `trlpatch.ray.async_rollouts`.
    """

    def __init__(self, engines: AsyncEngines, versions: PolicyVersions) -> None:
        """Nothing is sent yet."""
        self._engines = engines
        self._versions = versions
        self._adapters: AdapterSync | None = None
        self._model: Any = None
        self._put_back: Callable[[], None] = lambda: None
        self._paused = False

    def follow(self, model: Any) -> bool:
        """Say which model is trained; before the first transfer. True when its adapter alone is sent.

        Raises:
            RankAboveEngine: its adapter's rank is above what the engines were built for.
        """
        self._model = model
        reason = self._reason_for_weights()
        if reason is None:
            self._adapters = self._engines.rollout_backend().new_adapter_sync()
            self._put_back = leave_unmerged(model)
        elif lora_view(model) is not None:
            log_once(self, f"full weights are sent to the engines, the adapter merged into them: {reason}")
        return reason is None

    # TRL's WeightTransferProtocol.

    def init_weight_transfer(self) -> None:
        """See that every engine is up.

        Raises:
            EngineLost: one is not.
        """
        for health in self._engines.health():
            if isinstance(health, BaseException):
                raise health

    def pause(self) -> None:
        """Have every engine finish its step and begin no other; requests in flight are kept, with their KV cache."""
        self._paused = True
        self._on_each("pause")

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Send the policy, as the version that the trainer counts next; `iterator` is not touched for an adapter.

        Raises:
            EngineLost: an engine has not taken it; it answers nothing any more.
        """
        if self._adapters is not None:
            view = lora_view(self._model)
            assert view is not None
            self._adapters.publish(view.weights(view.active[0]))
        else:
            self._engines.send_weights(iterator)
        self._versions.sent(self._engines.version)

    def resume(self) -> None:
        """Have every engine go on."""
        self._on_each("resume")
        self._paused = False

    def destroy(self) -> None:
        """Leave the engines as they can be used by others."""
        self._put_back()
        self._put_back = lambda: None
        if self._paused:
            with contextlib.suppress(Exception):  # the error that left them paused is under way
                self.resume()

    def _on_each(self, method: str) -> None:
        self._engines.on_each(method, timeout=self._engines.timeouts.sync)

    def _reason_for_weights(self) -> str | None:
        view = lora_view(self._model)
        if view is None:
            return "the policy has no adapter"
        reason = lora_support.unsupported_reason(view)
        if reason is None and any(
            hasattr(tensor, "full_tensor") for tensor in view.weights(view.active[0]).parameters
        ):
            # Gathering them is a collective operation, and TRL calls send_weights on one rank alone.
            reason = "its tensors are sharded over ranks (FSDP2), and TRL gathers full weights only"
        return reason or self._reason_of_engines(view)

    def _reason_of_engines(self, view: LoraView) -> str | None:
        rank = lora_support.rank_of(view)
        for info in self._engines.infos:
            lora = info.vllm_config.lora_config
            if lora is None:
                return f"rollout engine {info.index} was built without `enable_lora=True`"
            if lora.max_lora_rank < rank:
                raise RankAboveEngine(
                    f"sending the adapter to rollout engine {info.index}: its rank is {rank}, and the engine was "
                    f"built for max_lora_rank={lora.max_lora_rank}; `create_engines(..., enable_lora=True, "
                    f"max_lora_rank={rank})`, or a smaller r"
                )
        return None
