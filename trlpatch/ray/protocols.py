"""What the parts of rollouts on Ray need of each other, as types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.engine.protocols import LoraRequest
    from trlpatch.ray.messages import EngineHealth, EngineInfo, RolloutRequest, Version
    from trlpatch.ray.packed import PackedAdapter
    from trlpatch.ray.supervision import Supervisor
    from trlpatch.ray.timeouts import Timeouts


class WeightSender(Protocol):
    """Sends full weights to every engine."""

    def send(self, weights: Iterable[tuple[str, Tensor]], version: str) -> object:
        """Every engine has these weights when it returns, and `Engines.took_weights` was called.

        Raises:
            EngineLost: one of them has not, and is lost.
        """


class Engines(Protocol):
    """`trlpatch.ray.engines.RayEngines`."""

    timeouts: Timeouts
    supervisor: Supervisor
    weight_sender: WeightSender | None
    weights_version: str
    adapter_version: int
    adapter_ref: Any
    adapter_bytes: int
    sync_seconds: float

    @property
    def handles(self) -> list[Any]:
        """The actors, by index."""

    @property
    def infos(self) -> list[EngineInfo]:
        """What each said of itself when it was up."""

    @property
    def location(self) -> str:
        """How many actors, and where."""

    @property
    def version(self) -> Version:
        """What every engine holds."""

    def answer(self, asked: Sequence[Any]) -> list[Any]:
        """The outputs of requests that were added by hand."""

    def submit(self, index: int, request: RolloutRequest) -> Any:
        """Send one engine a request."""

    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every actor."""

    def health(self, timeout: float | None = None) -> list[EngineHealth | BaseException]:
        """How every engine does."""

    def abort(self, key: str | None = None) -> None:
        """Have every engine drop requests."""

    def replaced(self, error: BaseException, index: int) -> None:
        """Have a lost engine replaced."""

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes on every engine."""

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every worker of every engine."""

    def holds_live(self, request: LoraRequest) -> bool:
        """Is it the request of the adapter that every engine holds?"""

    def adapter_of(self, request: LoraRequest | None) -> int:
        """The version of the live adapter that a request names."""

    def publish_adapter(self, packed: PackedAdapter, request: LoraRequest) -> None:
        """Have every engine take an adapter."""

    def send_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Have every engine take full weights."""

    def took_weights(self, version: str) -> None:
        """Note that every engine has them."""
