"""`RayEngines`: rollout engines on Ray actors, with the surface of one `vllm.LLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trlpatch.ray.messages import EngineInfo, RolloutRequest, RolloutResponse
from trlpatch.ray.timeouts import Timeouts


class RayEngines:
    """What `create_engines` returns, and what `attach_engine(model, engines)` takes."""

    handles: list[Any]
    """The actors, by index; a lost engine's is replaced in place."""
    infos: list[EngineInfo]
    timeouts: Timeouts
    adapter_version: int
    """Of the adapter that every engine holds; 0 for none."""

    def ask(self, request: RolloutRequest) -> list[RolloutResponse]:
        """Spread a request over the engines and wait for the answers, in any order of engines."""
        raise NotImplementedError

    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every actor, at once, and give the answers by index.

        Raises:
            EngineLost: an actor is dead.
            RolloutTimeout: one did not answer in time.
        """
        raise NotImplementedError

    def generate(self, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Sequence[Any]:
        """As `vllm.LLM.generate`."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """End all engines."""
        raise NotImplementedError
