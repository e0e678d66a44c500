"""`RayEngines`: rollout engines on Ray actors, with the surface of one `vllm.LLM`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trlpatch.engine.adapter_sync.registry import LIVE_NAME
from trlpatch.errors import EngineLost, NoEngineLeft, StaleAdapter, TrlpatchError
from trlpatch.log import log_once
from trlpatch.ray.actor import CONTROL, ROLLOUTS
from trlpatch.ray.calls import gather
from trlpatch.ray.facade import Asked, RayLLMEngine
from trlpatch.ray.fleet import RayCluster
from trlpatch.ray.messages import (
    CHECKPOINT_WEIGHTS,
    EngineHealth,
    EngineInfo,
    RolloutRequest,
    RolloutResponse,
    Version,
    following,
)
from trlpatch.ray.prompts import as_conversations, as_prompts, cost_of, one_each
from trlpatch.ray.restore import Restore
from trlpatch.ray.rollout import Rollout
from trlpatch.ray.supervision import Supervisor
from trlpatch.ray.timeouts import Timeouts
from trlpatch.ray.worker_calls import WorkerCalls

if TYPE_CHECKING:
    from torch import Tensor

    from trlpatch.engine.backend import RolloutBackend
    from trlpatch.engine.protocols import LoraRequest
    from trlpatch.ray.packed import PackedAdapter
    from trlpatch.ray.prefetch import Prefetch
    from trlpatch.ray.protocols import WeightSender


_all: weakref.WeakSet[RayEngines] = weakref.WeakSet()


class RayEngines(WorkerCalls):
    """What `create_engines` returns, and what `attach_engine(model, engines)` takes."""

    def __init__(
        self,
        handles: Sequence[Any],
        infos: Sequence[EngineInfo],
        timeouts: Timeouts | None = None,
        *,
        release: Callable[[], None] | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        """`release` gives the resources back, after the actors have ended; without `supervisor` none is replaced."""
        self.timeouts = timeouts or Timeouts()
        if supervisor is None:
            supervisor = Supervisor(None, len(handles), self.timeouts, cluster=RayCluster(CONTROL))
            supervisor.adopt(handles, infos)
        self.supervisor = supervisor
        supervisor.restore = Restore(self)
        self.weight_sender: WeightSender | None = None
        self.weights_version = CHECKPOINT_WEIGHTS
        self.adapter_version = 0
        """Of the adapter that was sent last; 0 for none."""
        self.adapter_ref: Any = None
        """It, in Ray's object store."""
        self.adapter_bytes = 0
        self.sync_seconds = 0.0
        """That the last adapter took to every engine."""
        self.up = True
        """Until `shutdown`."""
        self.prefetch = 0
        """How many batches GRPOTrainer's are generated ahead."""
        self._prefetched: Prefetch | None = None
        self._live: LoraRequest | None = None
        self._release = release
        if release is not None:  # the actors end with their handles; what was reserved for them does not
            weakref.finalize(self, release).atexit = False
        self.llm_engine = RayLLMEngine(self)
        _all.add(self)

    def __repr__(self) -> str:
        return f"RayEngines({self.infos[0].model}, {self.location})"

    @property
    def handles(self) -> list[Any]:
        """The actors, by index; a lost engine's is replaced in place."""
        return [place.actor for place in self.supervisor.places]

    @property
    def infos(self) -> list[EngineInfo]:
        """What each said of itself when it was up."""
        return [place.info for place in self.supervisor.places]

    # What trlpatch asks of an engine.

    def rollout_backend(self) -> RolloutBackend:
        """The backend that `trlpatch.engine.backend.choose_backend` takes for these."""
        from trlpatch.ray.backend import RayBackend

        return RayBackend(self)

    def prepare_trainer(self, trainer: Any, args: Any) -> None:
        """A trainer that rolls out here is about to be initialised: it trains on its first GPU.

        Without a launcher transformers uses all visible GPUs, those of engines too, by `torch.nn.DataParallel`.

        Raises:
            PrefetchNotSupported: prefetch is on, and this trainer's batches cannot be generated ahead.
        """
        if getattr(args, "n_gpu", 1) > 1:
            log_once(self, f"training uses one of the {args.n_gpu} GPUs that are visible: engines have others")
            args._n_gpu = 1
        if self.prefetch:
            from trlpatch.ray.prefetch import Prefetch, refuse_prefetch

            refuse_prefetch(trainer, args, self.prefetch)
            self._prefetched = Prefetch(trainer, partial(self._ask_now, "generate"), partial(self._ask_now, "chat"))

    @property
    def location(self) -> str:
        """How many actors, where, and what is missing of them."""
        nodes = sorted({info.node for info in self.infos})
        parallel = self.infos[0].vllm_config.parallel_config.tensor_parallel_size
        count = f"{len(self.handles)} Ray actor{'s' if len(self.handles) > 1 else ''}"
        missing = f"; {self.supervisor.degraded}" if self.up and self.supervisor.degraded else ""
        return f"{count}{f' of {parallel} ranks each' if parallel > 1 else ''} on {', '.join(nodes)}{missing}"

    @property
    def replicas(self) -> list[RayEngines]:
        """Each engine alone, to ask all of them the same."""
        return [
            RayEngines([handle], [info], self.timeouts) for handle, info in zip(self.handles, self.infos, strict=True)
        ]

    # What trainers and users ask of a `vllm.LLM`.

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """As `vllm.LLM.generate`: one `RequestOutput` a prompt, in order."""
        if priority is not None:
            arguments["priority"] = priority
        return self._ask(
            "generate", prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request, **arguments
        )

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: Any = True,
        lora_request: Any = None,
        **arguments: Any,
    ) -> list[Any]:
        """As `vllm.LLM.chat`; the engine's process renders the conversations."""
        return self._ask("chat", messages, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request, **arguments)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return (self._ask_now if self._prefetched is None else self._prefetched.asked)(method, *args, **kwargs)

    def _ask_now(
        self,
        method: str,
        prompts: Any,
        sampling_params: Any,
        *,
        use_tqdm: Any,
        lora_request: Any,
        priority: Sequence[int] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """Have all prompts answered, by nothing that was generated ahead."""
        found = as_prompts(prompts) if method == "generate" else as_conversations(prompts)
        priorities = one_each(priority, len(found), "priority")
        self._flush_weights()
        inner = self.llm_engine
        params = one_each(sampling_params, len(found), "sampling_params")
        adapters = one_each(lora_request, len(found), "lora_request")
        names = []
        try:
            for place, prompt in enumerate(found):
                name = inner.fresh_name()
                names.append(name)
                # By way of `add_request`, whose guard sees to the adapter.
                inner.add_request(
                    name, prompt, params[place], lora_request=adapters[place], priority=priorities[place]
                )
            asked = [inner.asked[name] for name in names]
            return Rollout(self, asked, method, arguments, use_tqdm).outputs()
        finally:
            inner.abort_request(names)

    def answer(self, asked: Sequence[Asked]) -> list[Any]:
        """The outputs of requests that were added by hand, each under its own name."""
        self._flush_weights()
        outputs = Rollout(self, asked, "generate", {}, False).outputs()
        for one, output in zip(asked, outputs, strict=True):
            output.request_id = one.name
        return outputs

    def sleep(self, level: int = 1, **_: Any) -> None:
        """Put every engine to sleep; nothing needs that, since they have GPUs of their own."""
        self.llm_engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake every engine."""
        self.llm_engine.wake_up(tags)

    def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Forget cached prefixes on every engine; TRL ends a full-weight sync with it."""
        self._flush_weights()
        return all(self.on_each("reset_prefix_cache"))

    # Engines by themselves.

    def submit(self, index: int, request: RolloutRequest) -> Any:
        """Send one engine a request; the `ObjectRef` of its RolloutResponse.

        Raises:
            EngineLost: it was lost, and the one in its place does not serve yet.
        """
        place = self.supervisor.places[index]
        if place.state != "serving":
            raise EngineLost(f"engine {index} was asked, and does not serve: {self.supervisor.degraded}")
        return place.actor.generate.options(concurrency_group=ROLLOUTS).remote(request)

    def ask(self, request: RolloutRequest) -> RolloutResponse:
        """Have one request answered by the engine with the least to do, and by another one if that is lost.

        Many threads may ask at once.

        Raises:
            RolloutFailed: two engines were lost over it.
            NoEngineLeft: none is left, and none could be replaced.
            Whatever vLLM says of the prompts.
        """
        params = request.sampling_params or [None] * len(request.prompts)
        cost = sum(cost_of(prompt, one) for prompt, one in zip(request.prompts, params, strict=True))
        response: RolloutResponse = self.supervisor.ask(
            lambda index: self.submit(index, request), cost=cost, key=request.key or None
        )
        return response

    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every actor, at once, and give the answers in the order of engines.

        One that does not answer in time, or is dead, is replaced; the list has no answer of it.

        Raises:
            NoEngineLeft: none answered, and none could be replaced.
        """
        return [
            answer
            for _, answer in sorted(self.supervisor.everywhere(method, *args, timeout=timeout, **kwargs).items())
        ]

    def of_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(llm, *args)` in the first engine's process, between two steps."""
        return self.supervisor.anywhere("call", function, *args)

    def health(self, timeout: float | None = None) -> list[EngineHealth | BaseException]:
        """How every engine does; its exception in the place of one that cannot say."""
        refs = [handle.health.options(concurrency_group=CONTROL).remote() for handle in self.handles]
        return gather(refs, "health", self.timeouts.health if timeout is None else timeout)

    def abort(self, key: str | None = None) -> None:
        """Tell every engine to drop the requests with that key, or all; does not wait."""
        for handle in self.handles:
            handle.abort.options(concurrency_group=CONTROL).remote(key)

    # Adapter and weights.

    @property
    def version(self) -> Version:
        """What every engine holds."""
        return Version(self.adapter_version, self.weights_version)

    def holds_live(self, request: LoraRequest) -> bool:
        """Is it the request of the adapter that every engine holds?"""
        return self._live is not None and request.lora_name == self._live.lora_name

    def adapter_of(self, request: LoraRequest | None) -> int:
        """The version of the live adapter that a request names; 0 for none and for a saved one.

        Raises:
            StaleAdapter: it names one that was replaced.
        """
        if request is None or not request.lora_name.startswith(LIVE_NAME):
            return 0
        if not self.holds_live(request):
            held = "none" if self._live is None else repr(self._live.lora_name)
            raise StaleAdapter(
                f"a request for {request.lora_name!r}, a version of the live adapter that the engines do not hold: "
                f"they have {held}; ask for it at every rollout, lora_request=trlpatch.lora_request(model)"
            )
        return self.adapter_version

    def publish_adapter(self, packed: PackedAdapter, request: LoraRequest) -> None:
        """Have every engine take an adapter, which `request` stands for from now on.

        Raises:
            AdapterNotExpressible: they have no place for one of its modules; the version before still stands.
            NoEngineLeft: none of them took it in time, and none could be replaced.
        """
        import ray

        started = time.monotonic()
        before = self._live, self.adapter_version, self.adapter_ref, self.adapter_bytes
        # An engine that takes a lost one's place meanwhile is given this adapter.
        self._live, self.adapter_version = None, self.adapter_version + 1
        self.adapter_ref, self.adapter_bytes = ray.put(packed), packed.nbytes
        try:
            self.supervisor.publish("publish_adapter", self.adapter_ref, self.adapter_version)
        except NoEngineLeft:
            raise
        except TrlpatchError:  # refused before anything was changed; one that took it is given the version before
            self._live, self.adapter_version, self.adapter_ref, self.adapter_bytes = before
            raise
        self._live = request
        self.sync_seconds = time.monotonic() - started

    def send_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Have every engine take full weights."""
        if self.weight_sender is None:
            raise EngineLost("sending weights: these engines have no way for full weights")
        self.weight_sender.send(named, following(self.weights_version))

    def took_weights(self, version: str) -> None:
        """Note that every engine samples with these weights, and has no live adapter any more."""
        self.weights_version = version
        self.adapter_version, self.adapter_ref, self._live = 0, None, None

    def replaced(self, error: BaseException, index: int) -> None:
        """Have a lost engine replaced, and wait for the one in its place.

        Raises:
            NoEngineLeft: it cannot be done.
        """
        self.supervisor.lost(index, error)

    def _flush_weights(self) -> None:
        """Send what TRL's own sync has loaded; OnlineDPO of TRL 0.18 ends it without a word."""
        self.llm_engine.model_executor.driver_worker.model_runner.model.flush()

    # Life.

    def shutdown(self) -> None:
        """End all engines and give their resources back."""
        import ray

        handles, self.up = self.handles if self.up else [], False
        if ray.is_initialized():
            ending = [handle.shutdown.options(concurrency_group=CONTROL).remote() for handle in handles]
            ray.wait(ending, num_returns=len(ending), timeout=10.0) if ending else None
            self.supervisor.shutdown()
        release, self._release = self._release, None
        if release is not None:
            release()


def all_engines() -> list[RayEngines]:
    """Those of this process that are alive."""
    return [engines for engines in _all if engines.up]
