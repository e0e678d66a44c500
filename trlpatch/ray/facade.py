"""What stands behind `RayEngines` where `vllm.LLM` has its `llm_engine`: requests are noted here, and asked together.

Guards, hooks and TRL find what they look for: the configuration, `add_request`, sleep and wake, and the place that TRL
pushes full weights to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trlpatch.errors import AdapterNotExpressible, EngineLost

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.engine.protocols import LoraRequest
    from trlpatch.ray.protocols import Engines


@dataclass(frozen=True)
class Asked:
    """One prompt that has been added and not been answered."""

    name: str
    prompt: Any
    params: Any
    lora_request: LoraRequest | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class RayLLMEngine:
    """Stands for `vllm.v1.engine.llm_engine.LLMEngine` of engines elsewhere."""

    def __init__(self, engines: Engines) -> None:
        self._engines = weakref.ref(engines)
        self._names = itertools.count()
        self.vllm_config = engines.infos[0].vllm_config
        self.model_config = self.vllm_config.model_config
        self.output_processor = SimpleNamespace(request_states=dict[str, Asked]())
        """As vLLM's: what has been added and not been answered, by name."""
        pushed = PushedWeights(engines)
        self.model_executor = SimpleNamespace(
            driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=pushed, lora_manager=None))
        )
        """Where TRL's full-weight sync goes: `model_executor.driver_worker.model_runner.model.load_weights`."""

    @property
    def engines(self) -> Engines:
        """Whose this is.

        Raises:
            EngineLost: they are gone.
        """
        engines = self._engines()
        if engines is None:
            raise EngineLost("the rollout engines were deleted; create new ones and call trlpatch.attach_engine")
        return engines

    @property
    def asked(self) -> dict[str, Asked]:
        """What has been added and not been answered, by name, in order."""
        states: dict[str, Asked] = self.output_processor.request_states
        return states

    def fresh_name(self) -> str:
        """A name that no request had."""
        return str(next(self._names))

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: LoraRequest | None = None,
        *_: Any,
        **arguments: Any,
    ) -> str:
        """Note one request; `step` or the call that it belongs to asks the engines."""
        given = {name: value for name, value in arguments.items() if value not in (None, 0)}
        self.asked[request_id] = Asked(request_id, prompt, params, lora_request, given)
        return request_id

    def step(self) -> list[Any]:
        """Ask the engines for all that has been noted, and wait for it."""
        waiting = list(self.asked.values())
        try:
            return self.engines.answer(waiting)
        finally:
            self.abort_request([one.name for one in waiting])

    def has_unfinished_requests(self) -> bool:
        """Has something been noted that nobody was asked for?"""
        return bool(self.asked)

    def get_num_unfinished_requests(self) -> int:
        """How much of it."""
        return len(self.asked)

    def abort_request(self, request_ids: Iterable[str], internal: bool = False) -> None:
        """Forget requests."""
        for name in list(request_ids):
            self.asked.pop(name, None)

    def sleep(self, level: int = 1, **_: Any) -> None:
        """Put every engine to sleep."""
        self.engines.on_each("sleep", level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake every engine."""
        self.engines.on_each("wake_up", None if tags is None else list(tags))

    def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Forget cached prefixes on every engine."""
        return self.engines.reset_prefix_cache()

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every worker of every engine; one answer a worker."""
        return self.engines.collective_rpc(method, timeout, args, kwargs)


class PushedWeights:
    """Stands for the worker's model: collects what TRL's own sync loads, until it resets the prefix cache."""

    def __init__(self, engines: Engines) -> None:
        self._engines = weakref.ref(engines)
        self._collected: list[tuple[str, Tensor]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy some named parameters of the policy, as its checkpoint names them.

        Raises:
            AdapterNotExpressible: full weights cannot be sent to these engines.
        """
        engines = self._engines()
        if engines is None or engines.weight_sender is None:
            raise AdapterNotExpressible(
                "full weights are pushed to engines on Ray actors, and these have no way for them; expected a LoRA "
                "adapter that vLLM can serve"
            )
        named = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights]
        self._collected += named
        return {name for name, _ in named}

    def flush(self) -> None:
        """Send what has been collected to every engine, as one new version."""
        engines = self._engines()
        if not self._collected or engines is None:
            return
        named, self._collected = self._collected, []
        engines.send_weights(named)
