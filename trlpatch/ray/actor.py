"""`LLMRayActor`: one `vllm.LLM` in the process of one Ray actor, stepped by a thread of its own.

A plain class: `trlpatch.ray.create` makes a Ray actor of it, and tests use it as it is. Its methods run in threads of
the actor (`CONTROL_METHODS` in one concurrency group, rollouts in another), so that health is answered while all
others wait.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes
from trlpatch.engine.drain import drain
from trlpatch.errors import AdapterNotExpressible, EngineBusy, EngineMismatch, WrongVersion
from trlpatch.ray.capture import Addition, additions
from trlpatch.ray.messages import (
    BASE_ADAPTER,
    EngineHealth,
    EngineInfo,
    RolloutRequest,
    RolloutResponse,
    Version,
)
from trlpatch.ray.stepping import Stepper
from trlpatch.ray.transfer import shapes
from trlpatch.ray.transfer.methods import WeightTransferMethods
from trlpatch.ray.transfer.updates import WeightUpdates

if TYPE_CHECKING:
    from trlpatch.engine.adapter_sync.protocol import AdapterSync
    from trlpatch.engine.protocols import LoraRequest
    from trlpatch.policy.adapter_tensors import AdapterTensors
    from trlpatch.ray.packed import PackedAdapter

_CONFIGURATION = (
    "model_config", "cache_config", "parallel_config", "scheduler_config", "device_config", "load_config",
    "lora_config", "quant_config", "offload_config",
)  # fmt: skip
"""What the trainer's process is told of a `VllmConfig`. Its compilation_config refers to the engine's layers and to
the KV cache in them."""

CONTROL, ROLLOUTS = "control", "rollouts"
"""Concurrency groups of the actor: what must be answered at once, and what waits for completions."""


class LLMRayActor(WeightTransferMethods):
    """One rollout engine. Every method but `generate` and `ready` is short; none of them steps the engine itself."""

    def __init__(
        self,
        index: int,
        engine_arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        *,
        layers: str = "auto",
        weight_transfer: str = "auto",
        build: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        """Begin to build `vllm.LLM(**engine_arguments)`; `ready` waits for it.

        `environment` is set first. `layers` says whose LoRA layers it has, `weight_transfer` how full weights come to
        it, and `build` stands in for `build_engine`.
        """
        os.environ.update(environment or {})  # torch and vLLM, which read it, are not imported yet
        self.index = index
        self._started = time.monotonic()
        self._adapter_sync: AdapterSync | None = None
        self._live: LoraRequest | None = None
        self._source: Any = None
        """The weights that `_adapter_sync` got last: it refers to them weakly."""
        arguments, make = dict(engine_arguments), build or partial(_build, layers, weight_transfer)
        self.stepper = Stepper(lambda: make(arguments), index=index)
        self.weights = WeightUpdates(self.stepper, self._forget_adapter)

    # Life.

    def ready(self, timeout: float | None = None) -> EngineInfo:
        """Wait until the engine is up.

        Raises:
            Whatever vLLM raised while it was built.
        """
        llm = self.stepper.built.result(timeout)
        return self.stepper.between_steps(lambda _: describe(llm, self.index, time.monotonic() - self._started))

    def health(self) -> EngineHealth:
        """Tell how the engine does, without waiting for a step."""
        return self.stepper.health()

    def lose(self, reason: str) -> None:
        """Answer no request any more, e.g. since an update of the weights failed half-way."""
        self.stepper.lose(reason)

    def shutdown(self) -> None:
        """End the engine; the actor is to be killed afterwards."""
        self.stepper.stop()

    # Requests.

    def generate(self, request: RolloutRequest) -> RolloutResponse:
        """Answer all prompts of a request; several calls at once share the engine's batches.

        Raises:
            WrongVersion: the engine does not hold the version that is asked for; nothing was sampled.
            EngineLost: it answers nothing any more.
        """
        answers = self.stepper.generate(
            lambda llm: self._additions(llm, request), len(request.prompts), request.key
        ).result()
        return RolloutResponse(
            answers.outputs,
            answers.first_version,
            answers.last_version,
            self.index,
            answers.seconds,
            answers.tokens,
        )

    def abort(self, key: str | None = None) -> int:
        """Drop the requests with that key, or all; how many there were. Their callers get CancelledError."""
        return self.stepper.abort(key)

    def pause(self) -> None:
        """Step no further; requests in flight are kept, with their KV cache."""
        self.stepper.pause()

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        self.stepper.resume()

    # Adapter.

    def publish_adapter(self, adapter: AdapterTensors | PackedAdapter, version: int) -> Version:
        """Take an adapter between two steps; requests in flight go on with it. Returns what the engine holds then.

        Raises:
            AdapterNotExpressible: the engine has no place for one of its modules; nothing was changed.
            EngineMismatch: a place has another shape; nothing was changed.
            EngineBusy: this engine cannot exchange an adapter that requests in flight use; nothing was changed.
            EngineLost: anything else went wrong, and the engine is lost with it.
        """
        return self.stepper.between_steps(lambda llm: self._publish(llm, adapter, version))

    # Everything else.

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function(llm, *args, **kwargs)` between two steps."""
        return self.stepper.between_steps(lambda llm: function(llm, *args, **kwargs))

    def sleep(self, level: int = 1) -> None:
        """As `vllm.LLM.sleep`.

        Raises:
            EngineBusy: requests are unfinished.
        """
        self.stepper.between_steps(lambda llm: self._sleep(llm, level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """As `vllm.LLM.wake_up`."""
        self.stepper.between_steps(lambda llm: self._wake_up(llm, tags))

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False when blocks are in use."""
        return self.stepper.between_steps(lambda llm: llm.reset_prefix_cache() is not False)

    # In the stepping thread.

    def _additions(self, llm: Any, request: RolloutRequest) -> list[Addition]:
        self.weights.refuse_torn()
        held = self.stepper.version
        wanted = request.adapter
        if wanted not in (None, BASE_ADAPTER, held.adapter) or request.weights not in (None, held.weights):
            raise WrongVersion(
                f"rollout engine {self.index}: asked for adapter {wanted} on weights {request.weights or '(any)'}, it "
                f"holds {held}; nothing was sampled. Publish to every engine before rolling out"
            )
        lora = request.lora_request or (None if wanted == BASE_ADAPTER else self._live)
        arguments = {**request.arguments, "lora_request": lora}
        params = None if request.sampling_params is None else list(request.sampling_params)
        return additions(llm, request.method, list(request.prompts), params, arguments)

    def _publish(self, llm: Any, adapter: AdapterTensors | PackedAdapter, version: int) -> Version:
        from trlpatch.engine.adapter_sync import registry
        from trlpatch.engine.backend import backend_of
        from trlpatch.ray.adapter_source import lora_weights

        if self._adapter_sync is None:
            self._adapter_sync = backend_of(llm).new_adapter_sync()
        sync = self._adapter_sync
        if not sync.compares and self._live is not None and llm.llm_engine.has_unfinished_requests():
            raise EngineBusy(
                f"rollout engine {self.index} registers every version of the adapter anew ({sync.description}), which "
                "requests in flight cannot survive; nothing was changed: let them finish, or abort() them"
            )
        drain(llm)
        try:
            weights = lora_weights(adapter, self._source, device=_device_of(llm))
            self._live = sync.publish(weights)
            self._source = weights
            if not registry.names_separate_prefixes() and llm.reset_prefix_cache() is False:
                raise EngineBusy("this vLLM would reuse cached prefixes of the version before")
        except (AdapterNotExpressible, EngineMismatch):
            raise
        except BaseException as error:
            self.stepper.lose(error)
            raise
        held = self.stepper.version
        self.stepper.version = Version(version, held.weights)
        return self.stepper.version

    def _sleep(self, llm: Any, level: int) -> None:
        if llm.llm_engine.has_unfinished_requests():
            raise EngineBusy(f"rollout engine {self.index} is to sleep, and requests are unfinished; abort() them")
        drain(llm)
        llm.sleep(level)
        self.stepper.asleep = level > 0
        if level >= 2:
            self._forget_adapter()
            self.stepper.version = Version(BASE_ADAPTER, "discarded")

    def _forget_adapter(self) -> None:
        self._live, self._adapter_sync = None, None

    def _wake_up(self, llm: Any, tags: Sequence[str] | None) -> None:
        llm.wake_up(None if tags is None else list(tags))
        self.stepper.asleep = bool(tags is not None and "kv_cache" not in tags and self.stepper.asleep)


def describe(llm: Any, index: int, seconds: float) -> EngineInfo:
    """What the trainer's process has to know of an engine."""
    import vllm

    from trlpatch.engine.backend import backend_of

    whole = llm.llm_engine.vllm_config
    config = SimpleNamespace(**{name: getattr(whole, name) for name in _CONFIGURATION if hasattr(whole, name)})
    tasks = getattr(llm, "supported_tasks", None) or ("generate",)
    return EngineInfo(
        index=index,
        model=str(whole.model_config.model),
        vllm_config=config,
        vllm_version=str(vllm.__version__),
        node=_address(),
        pid=os.getpid(),
        devices=_devices(),
        seconds=seconds,
        lora_layers=backend_of(llm).lora_layers(),
        supported_tasks=tuple(map(str, tasks)),
    )


def _build(layers: str, weight_transfer: str, arguments: Mapping[str, Any]) -> Any:
    import torch

    from trlpatch.engine.build import build_engine

    route = shapes.route_for("cuda" if torch.cuda.is_available() else "cpu", weight_transfer)
    ranks = int(arguments.get("tensor_parallel_size") or 1)
    return build_engine({**shapes.engine_arguments(route, tensor_parallel_size=ranks), **arguments}, layers=layers)


def _device_of(llm: Any) -> Any:
    """Where the worker's parameters are, if it is in this process."""
    module = probes.engine_module(llm)
    parameter = None if module is None else next(iter(module.parameters()), None)
    return "cpu" if parameter is None else parameter.device


def _address() -> str:
    try:
        import ray

        return str(ray.util.get_node_ip_address())
    except Exception:  # used without Ray
        return socket.gethostname()


def _devices() -> tuple[str, ...]:
    """The GPUs that Ray gave to this process."""
    return tuple(one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip())
