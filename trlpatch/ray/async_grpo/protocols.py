"""What the worker and the transfer of AsyncGRPOTrainer touch of the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from trlpatch.ray.messages import EngineHealth, EngineInfo, RolloutRequest, RolloutResponse, Version
from trlpatch.ray.timeouts import Timeouts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from trlpatch.engine.backend import RolloutBackend


class AsyncEngines(Protocol):
    """`RayEngines`, as far as it is used here."""

    handles: list[Any]
    infos: list[EngineInfo]
    timeouts: Timeouts

    @property
    def version(self) -> Version:
        """What every engine holds."""

    def ask(self, request: RolloutRequest) -> RolloutResponse:
        """Have one request answered by the engine with the least to do, and by another one if that is lost."""

    def send_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Have every engine take full weights.

        Raises:
            EngineLost: an engine has not taken them; or these engines have no way for full weights.
        """

    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every `LLMRayActor`."""

    def health(self, timeout: float | None = None) -> list[EngineHealth | BaseException]:
        """How every engine does; its exception in the place of one that cannot say."""

    def abort(self, key: str | None = None) -> None:
        """Tell every engine to drop the requests with that key, or all; does not wait."""

    def rollout_backend(self) -> RolloutBackend:
        """The backend that hands adapters over."""
